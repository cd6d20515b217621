"""The examples of docs/analysis.md run, as a reader's login, over the files that `polytower export` writes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from polytower.cli import cli
from tests.serving.test_docs import _blocks

NAME = "analyst_of_docs"


@pytest.fixture
def analyst(documented: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ANALYST_URL, and the exported files in the current folder."""
    monkeypatch.setenv("POLYTOWER_DATABASE_URL", documented)
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(cli, ["db", "reader", NAME, "--json"], catch_exceptions=False)
    monkeypatch.setenv("ANALYST_URL", json.loads(made.stdout.splitlines()[-1])["url"])
    (command,) = _blocks("analysis.md", "sh")
    done = CliRunner().invoke(cli, command.split()[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    yield
    CliRunner().invoke(cli, ["db", "reader", NAME, "--drop"], catch_exceptions=False)


@pytest.mark.slow
def test_the_examples_run_in_order(analyst: None, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, object] = {}
    blocks = _blocks("analysis.md", "python")
    try:
        for block in blocks:
            exec(compile(block, "docs/analysis.md", "exec"), found)
        printed = capsys.readouterr().out
        assert "Limit" in printed
        assert "Title" in printed
        assert found["items"].shape == (100, 8)  # type: ignore[attr-defined]
        assert found["matrix"].shape == (100, 8)  # type: ignore[attr-defined]
        assert len(found["candidates"]) == 20  # type: ignore[arg-type]
    finally:
        found["connection"].close()  # type: ignore[attr-defined]
        found["engine"].dispose()  # type: ignore[attr-defined]

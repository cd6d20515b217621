"""The command line: what it offers is frozen in a golden file, it starts fast, and its errors say the way out."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from polytower.cli import cli
from polytower.commands.moment import Moment
from tests.factories import tiny_folder
from tests.test_goldens import surface

HEAVY = {
    "torch",
    "transformers",
    "dagster",
    "feast",
    "great_expectations",
    "pandas",
    "pyarrow",
    "sqlalchemy",
    "fastapi",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "polytower.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_help_loads_no_heavy_library() -> None:
    script = "import sys, polytower.cli; print(' '.join(name for name in sys.modules if '.' not in name))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not HEAVY & set(loaded.split())


def test_every_command_explains_itself() -> None:
    for line in surface(cli, ""):
        words = [word for word in line.split() if not word.startswith("-") and word in line.split()[:2]]
        command: click.Command = cli
        for word in words:
            if isinstance(command, click.Group) and word in command.commands:
                command = command.commands[word]
        assert command.help, line


def test_an_empty_database_names_the_next_step(platform: str) -> None:
    import migrations

    migrations.downgrade("base", platform)
    for command in (["evaluate"], ["retrieve", "1"], ["similar", "1"], ["generations", "list"]):
        done = run(*command)
        assert done.returncode == 1, command
        assert "polytower load DIR" in done.stderr
        assert "Traceback" not in done.stderr


def test_an_error_is_json_too(platform: str) -> None:
    done = run("retrieve", "nobody", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["error"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("where", ["{", "[1]", '"x"', "[" * 40_000, "1" * 5000])
def test_a_filter_that_is_no_json_object_is_refused(where: str) -> None:
    result = CliRunner().invoke(cli, ["retrieve", "1", "--filter", where])
    assert result.exit_code == 2
    assert "--filter" in result.output


def test_a_user_or_a_history_but_not_both() -> None:
    assert CliRunner().invoke(cli, ["retrieve"]).exit_code == 2
    assert CliRunner().invoke(cli, ["retrieve", "1", "--history", "2"]).exit_code == 2


def test_attributes_that_are_no_values_are_refused(platform: str) -> None:
    done = run("retrieve", "--attributes", '{"age": {"years": 3}}')
    assert done.returncode == 2
    assert "attributes.age" in done.stderr


def test_loading_twice_changes_nothing(platform: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "data")
    first, second = (json.loads(run("load", str(folder), "--json").stdout.splitlines()[-1]) for _ in range(2))
    assert first["counts"] != second["counts"]
    assert run("load", str(tmp_path / "nowhere")).returncode == 2


def test_rows_put_aside_are_named_and_end_with_a_status_of_their_own(platform: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "data", file_format="csv")
    log = folder / "interactions.csv"
    header, first = log.read_text().splitlines()[:2]
    row = dict(zip(header.split(","), first.split(","), strict=True)) | {'"item_id"': '"nowhere"'}
    log.write_text(log.read_text() + ",".join(row[name] for name in header.split(",")) + "\n")
    done = run("load", str(folder))
    assert done.returncode == 3
    assert "interactions.csv, row 641, item_id is in neither" in done.stdout
    assert run("load", str(folder), "--max-rejected", "0").returncode == 1


def test_no_postgres_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_DATABASE_URL", "postgresql://127.0.0.1:1/nothing")
    done = run("generations", "list")
    assert done.returncode == 1
    assert "polytower doctor" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_doctor_finds_everything_here(platform: str) -> None:
    done = run("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout.splitlines()[-1])}
    assert all(finding["ok"] for finding in findings.values()), findings
    assert {"python", "packages", "machine", "disk", "device", "weights"} <= set(findings)
    assert {"postgres", "pgvector", "schema", "rights", "roles"} <= set(findings)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("2000-12-01", "2000-12-01T00:00:00+00:00"),
        ("2000-12-01T18:30", "2000-12-01T18:30:00+00:00"),
        ("2000-12-01T18:30+02:00", "2000-12-01T18:30:00+02:00"),
    ],
)
def test_a_moment_is_utc_unless_it_says_otherwise(given: str, read: str) -> None:
    assert Moment().convert(given, None, None).isoformat() == read


def test_a_moment_that_is_none_says_how_one_looks() -> None:
    done = CliRunner().invoke(cli, ["materialize", "--before", "december"])
    assert done.exit_code == 2
    assert "'december' is not a date or time such as 2000-12-01" in done.output

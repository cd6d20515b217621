"""One question at all doors: HTTP, the command line, the client and SQL name the fields of serving/question.py."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import psycopg
import pytest
from click.testing import CliRunner
from psycopg.types.json import Jsonb

from polytower import client as api
from polytower.cli import cli
from polytower.client import client as client_module
from polytower.commands import retrieve as command
from serving import question as home
from serving.memory.merges import MERGES
from serving.models import RetrieveRequest
from serving.question import Question

FIELDS = set(Question.model_fields)
# What a door has under another name, or on purpose not at all.
CLIENT = {"fields": "titles"}
COMMAND_ALONE, NOT_OF_THE_COMMAND = {"as_json"}, {"fields"}  # the command always shows titles
# Spoken of before SQL is asked (what interests are made of), or after it (what candidates come with).
NOT_OF_SQL = {"history", "attributes", "text", "image", "fields", "found_by", "features", "similarity", "relevant"}
# question: what a text or picture has become
OF_SQL_ALONE = {"interests", "generation", "exact", "ef_search", "question"}


def test_http_has_every_field() -> None:
    assert set(RetrieveRequest.model_fields) == FIELDS
    assert issubclass(RetrieveRequest, Question)


def test_the_command_line_has_every_field() -> None:
    names = {parameter.name for parameter in command.retrieve.params}
    assert names - COMMAND_ALONE == FIELDS - NOT_OF_THE_COMMAND


def test_the_client_has_every_field() -> None:
    assert {each.name for each in fields(api.Question)} == {CLIENT.get(name, name) for name in FIELDS}


def test_sql_has_every_field(connection: psycopg.Connection[Any]) -> None:
    named = "select proargnames[1:pronargs] from pg_proc where proname = any (%s) and pronamespace = %s::regnamespace"
    rows = connection.execute(named, [["retrieve", "retrieve_vectors", "retrieve_mixed"], "polytower"]).fetchall()
    arguments = {name for (names,) in rows for name in names}
    assert (arguments - OF_SQL_ALONE) | {"vectors"} == FIELDS - NOT_OF_SQL


def test_merges_and_spaces_are_the_same_everywhere(connection: psycopg.Connection[Any]) -> None:
    options: dict[str, Any] = {parameter.name or "": parameter.type for parameter in command.retrieve.params}
    assert set(get_args(home.Merge)) == set(options["merge"].choices) == set(get_args(client_module.Merge))
    assert set(get_args(home.Merge)) == {*MERGES, "sum"}  # which Postgres alone answers
    assert tuple(options["space"].choices) == home.SPACE_NAMES
    schema = RetrieveRequest.model_json_schema()["properties"]["space"]["anyOf"][0]
    assert tuple(schema["enum"]) == home.SPACE_NAMES
    for merge in MERGES:
        diversity = Jsonb({"attribute": "genres", "weight": 1}) if merge == "diverse" else None
        ask = "select * from polytower.retrieve('ada', 1, merge => %s, diversity => %s)"
        assert connection.execute(ask, [merge, diversity]).fetchone() is not None


def test_the_command_line_asks_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v.json").write_text("[[1, 0], [0, 1]]")
    np.save(tmp_path / "v.npy", np.eye(2, dtype=np.float32))
    for file in ("v.json", "v.npy"):
        line = ["--vectors", str(tmp_path / file), "--weights", "0.7,0.3", "--space", "id", "--exclude", "a,b",
                "--allow", '["c,d"]', "--merge", "diverse", "--diversity", '{"attribute": "genres", "weight": 0.5}',
                "--include-seen", "--no-found-by", "-k", "7", "--filter", '{"year": 1}']  # fmt: skip
        assert _asked(monkeypatch, *line) == Question(
            vectors=[[1.0, 0.0], [0.0, 1.0]], weights=[0.7, 0.3], space="id", exclude=["a", "b"], allow=["c,d"],
            merge="diverse", diversity=home.Diversity(attribute="genres", weight=0.5), exclude_seen=False,
            found_by=False, k=7, filter={"year": 1}, fields=["title"],
        )  # fmt: skip
    assert _asked(monkeypatch, "u") == Question(user_id="u", k=10, fields=["title"])
    assert _asked(monkeypatch, "--history", "a,b", "--attributes", '{"age": 3}') == Question(
        history=["a", "b"], attributes={"age": 3}, k=10, fields=["title"]
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([], "give one of user_id, history or attributes, vectors, text or image; this question has none"),
        (["u", "--weights", "1"], "weights go with vectors only"),
        (["u", "--weights", "heavy"], "'heavy' is not numbers separated by commas"),
        (["u", "--diversity", '{"attribute": "genres"}'], "diversity.weight: Field required"),
        (["u", "--exclude", "[1"], "not JSON"),
        (["u", "--exclude", "[1]"], "exclude.0: Input should be a valid string"),
        (["u", "--features", "ranker"], "add --json"),
        (["--text", "x", "--space", "id"], "a text has no place in the id space; ask in text or content or item"),
        (["--text", "x", "--space", "image"], "a text has no place in the image space"),
        (["u", "--space", "text"], "space goes with vectors, text and image"),
        (["u", "--mix", "0.5"], "mix goes with a user (or history) and a text or picture"),
        (["u", "--text", "x", "--mix", "0.5", "--merge", "quota"], "is answered by merge = max alone"),
        (["u", "--text", "x", "--history", "a"], "this question has user_id, history or attributes, text or image"),
    ],
    ids=str,
)
def test_the_command_line_says_what_is_wrong(line: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, ["retrieve", *line])
    assert result.exit_code == 2
    assert words in re.sub(r"\s+", " ", result.output)


def test_a_file_that_holds_no_vectors(tmp_path: Path) -> None:
    for name, content in {"v.npy": b"nothing", "v.json": b"{", "w.json": b"\xff"}.items():
        (tmp_path / name).write_bytes(content)
        result = CliRunner().invoke(cli, ["retrieve", "--vectors", str(tmp_path / name)])
        assert f"{name}: cannot be read as vectors" in str(result.exception)
    (tmp_path / "v.json").write_text(json.dumps({"a": 1}))
    result = CliRunner().invoke(cli, ["retrieve", "--vectors", str(tmp_path / "v.json")])
    assert "vectors: Input should be a valid list" in result.output


def _asked(monkeypatch: pytest.MonkeyPatch, *line: str) -> Question:
    """The question that the command line makes of its options."""
    made = {}

    class Asked(Exception):  # noqa: N818
        pass

    real = command._question

    def caught(**parts: Any) -> Question:
        made["question"] = real(**parts)
        raise Asked

    monkeypatch.setattr(command, "_question", caught)
    with pytest.raises(Asked):
        command.retrieve.main([*line], standalone_mode=False)
    monkeypatch.setattr(command, "_question", real)
    assert isinstance(command.retrieve, click.Command)
    return made["question"]

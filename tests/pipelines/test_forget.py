"""Erasure: nothing names who was forgotten, in any table, generation or checkpoint; neither a reload nor a rollback
brings it back, and what is left is served, promoted and trained on as before."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

from encoders.content.registry import CONTENT_ENCODERS
from pipelines.content_embeddings import encode_modality
from pipelines.forget import forget, lift, remaining
from pipelines.generation import lifecycle
from pipelines.generation.build import build
from pipelines.generation.evaluation import evaluate_generation
from pipelines.generation.training import train_checkpoint
from pipelines.generation.training_set import read_training_set
from pipelines.load.folder import load_folder
from pipelines.sequences import changed_days, refresh_sequences
from polytower.cli import cli
from polytower.errors import UserError
from polytower.postgres import connect
from polytower.settings import settings
from tests.factories import tiny_folder

Connection = psycopg.Connection[Any]


@pytest.fixture
def filled(platform: str, tmp_path: Path) -> Iterator[Connection]:
    """Two generations of one checkpoint, the second one live; sequences, statistics, a rejected row."""
    with connect(platform) as connection:
        load_folder(connection, tiny_folder(tmp_path / "data"))
        days = changed_days(connection)
        assert days is not None
        refresh_sequences(connection, *days)
        encode_modality(connection, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
        trained = train_checkpoint(read_training_set(connection), "tiny", settings().checkpoints_dir, device="cpu")
        first = build(connection, trained.directory)
        lifecycle.promote(connection, first)
        connection.execute("update generations set config = config || '{\"again\": true}'")  # so that it is not found
        lifecycle.promote(connection, build(connection, trained.directory))
        connection.execute(
            """insert into rejected_rows (load_id, file, row_number, reason, value)
               values (1, 'users.csv', 1, 'repeats a key', 'u7'), (1, 'items.csv', 1, 'repeats a key', 'i7')"""
        )
        connection.commit()
        yield connection


def named(connection: Connection, entity_id: str) -> list[str]:
    """The tables in which any value, or element of a list, is the id: found without knowing where to look."""
    tables = connection.execute(
        """select c.relname from pg_class c where c.relnamespace = 'polytower'::regnamespace and c.relkind = 'r'"""
    ).fetchall()
    statement = "select exists (select from {} t, jsonb_path_query(to_jsonb(t), '$.**') v where v = to_jsonb(%s::text))"
    return [
        table
        for (table,) in tables
        if connection.execute(
            sql.SQL(statement).format(sql.Identifier("polytower", table)),  # type: ignore[arg-type]
            [entity_id],
        ).fetchone()
        == (True,)
    ]


def in_files(entity_id: str) -> list[str]:
    home = settings().checkpoints_dir
    return [str(path) for path in home.rglob("*") if path.is_file() and f'"{entity_id}"'.encode() in path.read_bytes()]


@pytest.mark.parametrize(("entity", "entity_id"), [("user", "u7"), ("item", "i7")])
def test_nothing_names_the_forgotten(filled: Connection, entity: Any, entity_id: str) -> None:
    assert len(named(filled, entity_id)) > 6
    assert in_files(entity_id)
    others = filled.execute("select count(*) from interactions where %s not in (user_id, item_id)", [entity_id])
    kept = others.fetchone()
    found = forget(filled, entity, entity_id)
    assert named(filled, entity_id) == []
    assert in_files(entity_id) == []
    assert set(found.remaining.values()) == {0}
    assert found.removed["interactions"] > 0
    assert found.removed["checkpoints"] == 1
    assert found.removed["user_interests" if entity == "user" else "item_embeddings"] > 1  # of both generations
    assert dict(filled.execute(found.proof).fetchall()) == found.remaining  # type: ignore[call-overload]
    assert filled.execute("select count(*) from interactions").fetchone() == kept
    # What is left may be gone back to, built from and evaluated; nothing brings the forgotten back.
    lifecycle.rollback(filled)
    again = build(filled, next(settings().checkpoints_dir.iterdir()))
    lifecycle.promote(filled, again)
    assert lifecycle.get(filled, again).quality["passed"]
    assert evaluate_generation(filled).questions >= 39
    assert named(filled, entity_id) == []


@pytest.mark.parametrize(("entity", "entity_id"), [("user", "u7"), ("item", "i7")])
def test_a_reload_leaves_the_forgotten_out_and_says_so(
    filled: Connection, tmp_path: Path, entity: Any, entity_id: str
) -> None:
    found = forget(filled, entity, entity_id)
    report = load_folder(filled, tmp_path / "data")
    assert report.counts["interactions_forgotten"] == found.removed["interactions"]
    assert report.counts[f"{entity}s_forgotten"] == 1
    assert report.counts["interactions_rejected"] == 0
    assert set(remaining(filled, entity, entity_id).values()) == {0}
    assert lift(filled, entity, entity_id)
    assert not lift(filled, entity, entity_id)
    report = load_folder(filled, tmp_path / "data")
    assert report.counts["interactions_new"] == found.removed["interactions"]


def test_somebody_who_comes_back_is_somebody_new(filled: Connection, tmp_path: Path) -> None:
    forget(filled, "user", "u7")
    later = datetime.now(UTC) + timedelta(minutes=2)
    folder = tmp_path / "later"
    folder.mkdir()
    row = {"user_id": "u7", "item_id": "i1", "occurred_at": later.isoformat()}
    (folder / "interactions.jsonl").write_text(json.dumps(row) + "\n")
    assert load_folder(filled, folder).counts["interactions_new"] == 1


def test_sequences_lose_the_item_alone(filled: Connection) -> None:
    statement = "select user_id, day, item_ids, cardinality(kinds), cardinality(occurred_ats) from user_sequences"
    before = {row[:2]: row[2] for row in filled.execute(statement).fetchall()}
    forget(filled, "item", "i7")
    after = {row[:2]: row[2:] for row in filled.execute(statement).fetchall()}
    cut = {key: [item for item in items if item != "i7"] for key, items in before.items()}
    assert {key: items for key, (items, _, _) in after.items()} == {key: items for key, items in cut.items() if items}
    assert all(len(items) == kinds == times for items, kinds, times in after.values())


def test_a_generation_that_was_damaged_before_stays_so(filled: Connection) -> None:
    lifecycle.amends(filled)
    filled.execute("update user_interests set weight = 1 - weight where generation = 1 and user_id = 'u8'")
    filled.commit()
    forget(filled, "user", "u7")
    with pytest.raises(UserError, match="was changed after its gates had measured it: user_interests"):
        lifecycle.promote(filled, 1)


def test_a_deleted_item_stops_nothing(filled: Connection) -> None:
    filled.execute("delete from items where item_id = 'i7'")
    filled.commit()
    encode_modality(filled, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
    training_set = read_training_set(filled)
    assert "i7" not in training_set.catalogue.item_ids
    generation = build(filled, next(settings().checkpoints_dir.iterdir()))
    assert lifecycle.get(filled, generation).quality["passed"]
    trained = train_checkpoint(training_set, "tiny", settings().checkpoints_dir, device="cpu")
    lifecycle.promote(filled, build(filled, trained.directory))


def test_the_command_asks_removes_and_proves(filled: Connection) -> None:
    refused = CliRunner().invoke(cli, ["forget", "user", "u7"], input="n\n")
    assert refused.exit_code == 1
    assert remaining(filled, "user", "u7")["interactions"] > 0
    filled.commit()
    told = CliRunner().invoke(cli, ["forget", "user", "u7", "--yes"])
    assert told.exit_code == 0, told.output
    assert "user_interests" in told.stdout
    assert "to see for yourself:\nselect " in told.stdout
    assert set(remaining(filled, "user", "u7").values()) == {0}
    filled.commit()
    unknown = CliRunner().invoke(cli, ["forget", "item", "nobody knows it", "--yes", "--json"])
    assert json.loads(unknown.stdout)["removed"]["items"] == 0
    lifted = CliRunner().invoke(cli, ["forget", "item", "nobody knows it", "--lift"])
    assert "may bring" in lifted.stdout


def test_the_quality_page_names_every_gate_and_what_failed(filled: Connection) -> None:
    good = CliRunner().invoke(cli, ["generations", "quality"])
    assert good.exit_code == 0, good.output
    assert "held_out_recall" in good.stdout
    filled.execute(
        """update generations set quality = jsonb_set(jsonb_set(quality, '{gates,0,passed}', 'false'),
                                                      '{gates,0,value}', '"nan"')"""
    )
    filled.commit()
    bad = CliRunner().invoke(cli, ["generations", "quality", "1"])
    assert bad.exit_code == 1
    assert "item_finite: item embeddings: vectors hold NaN or infinity" in bad.stdout
    assert json.loads(CliRunner().invoke(cli, ["generations", "quality", "1", "--json"]).stdout)["generation"] == 1

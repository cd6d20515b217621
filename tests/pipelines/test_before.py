"""A generation that was trained before a moment knows nothing of what came later, whatever that was."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import psycopg
import pytest

from encoders.content.registry import CONTENT_ENCODERS
from encoders.training import checkpoint
from pipelines.content_embeddings import encode_modality
from pipelines.generation import lifecycle, training_folder
from pipelines.generation.build import build, interest_rows
from pipelines.generation.evaluation import evaluate_generation
from pipelines.generation.past_interests import past_interests, with_past_interests
from pipelines.generation.training import Checkpoint, aligned, read_snapshot, train_checkpoint
from pipelines.generation.training_set import read_catalogue, read_histories
from pipelines.load.folder import load_folder
from pipelines.orchestration.materialize import materialize
from pipelines.sequences import changed_days, refresh_sequences
from polytower.errors import UserError
from polytower.postgres import connect
from tests.factories import tiny_folder

MOMENT = datetime(2024, 1, 1, tzinfo=UTC)  # half of the ten days are before it
CHURN = "neighbour_churn"  # compares with the live generation, which may know more


@dataclass(frozen=True)
class Past:
    """A generation that ends at MOMENT, and what it was made from."""

    connection: psycopg.Connection[Any]
    home: Path
    checkpoint: Checkpoint
    generation: int


def train(connection: psycopg.Connection[Any], home: Path, name: str) -> Checkpoint:
    folder = training_folder.save(connection, home / "sets", before=MOMENT).directory
    return train_checkpoint(training_folder.load(folder), "tiny", home / name, options={"epochs": 2}, device="cpu")


@pytest.fixture(scope="module")
def past(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Past]:
    home = tmp_path_factory.mktemp("home")
    with connect(module_database) as connection:
        load_folder(connection, tiny_folder(home / "data"))
        encode_modality(connection, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
        found = train(connection, home, "checkpoints")
        yield Past(connection, home, found, build(connection, found.directory))


def vectors(connection: psycopg.Connection[Any], generation: int) -> dict[Any, Any]:
    """Everything that is stored of a generation."""
    items = connection.execute(
        "select item_id, embedding, content_embedding, id_embedding from item_embeddings where generation = %s",
        [generation],
    ).fetchall()
    users = connection.execute(
        "select user_id, interest, embedding, weight, as_of, events from user_interests where generation = %s",
        [generation],
    ).fetchall()
    plain = [tuple(v.to_numpy().tobytes() if hasattr(v, "to_numpy") else v for v in row) for row in (*items, *users)]
    return {row[:2] if len(row) == 6 else row[0]: row for row in plain}


def gates(connection: psycopg.Connection[Any], generation: int) -> dict[str, Any]:
    found = lifecycle.get(connection, generation).quality["gates"]
    return {gate["name"]: gate["value"] for gate in found if gate["name"] != CHURN}


def test_it_says_so_and_passes_its_gates(past: Past) -> None:
    found = lifecycle.get(past.connection, past.generation)
    assert found.trained_before == MOMENT
    assert found.config["before"] == past.checkpoint.trained_before == MOMENT.isoformat()
    assert found.quality["passed"]
    newest, events = past.connection.execute(
        """select max(as_of), (select sum(events) from user_interests
                               where generation = %(g)s and interest = 0)
           from user_interests where generation = %(g)s""",
        {"g": past.generation},
    ).fetchone()  # type: ignore[misc]
    assert newest < MOMENT
    counted = past.connection.execute("select count(*) from interactions where occurred_at < %s", [MOMENT]).fetchone()
    assert (events,) == counted
    assert gates(past.connection, past.generation)["stale_users"] == 0


def test_interests_at_a_later_moment_are_of_the_events_before_it(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.generation.past_interests.ROW_CHUNK", 13)  # 40 users: three rounds and a remainder
    catalogue, _ = read_catalogue(past.connection)
    item_ids, _ = read_snapshot(past.checkpoint.directory)
    towers, _, _ = checkpoint.load(past.checkpoint.directory, aligned(catalogue, item_ids))
    items = towers.item_embeddings().item
    # A moment that is itself an event's: that event is not before it.
    later = past.connection.execute(
        "select occurred_at from interactions where occurred_at > %s order by occurred_at offset 100 limit 1", [MOMENT]
    ).fetchone()
    assert later is not None
    for moment in (MOMENT, later[0]):
        histories = read_histories(past.connection, catalogue, moment)
        expected = {
            (user, interest): (vector, weight)
            for rows in interest_rows(towers, items, histories, progress=False)
            for user, interest, vector, weight in zip(
                rows.user_ids, rows.interest, rows.embedding, rows.weight, strict=True
            )
        }
        users = [*histories.user_ids, "nobody"]
        found = past_interests(past.connection, past.generation, users, [moment] * len(users))
        for (user, interest), (vector, weight) in expected.items():
            row = users.index(user)
            np.testing.assert_allclose(found.vectors[row, interest], vector, atol=5e-3)
            np.testing.assert_allclose(found.weights[row, interest], weight, atol=5e-3)
        assert not found.weights[-1].any()
    frame = pd.DataFrame(
        {
            "user_id": users,
            "event_timestamp": pd.to_datetime([later[0]] * len(users), utc=True),
            "interests": None,
            "interest_weights": None,
            "interest_count": None,
            "interests_generation": [float(past.generation)] * (len(users) - 1) + [np.nan],
        }
    )
    answer = with_past_interests(past.connection, frame)
    np.testing.assert_allclose(answer["interests"][3], found.vectors[3].ravel())
    np.testing.assert_allclose(answer["interest_weights"][3], found.weights[3])
    assert answer["interests"].isna().tolist() == [False] * (len(users) - 1) + [True]
    assert answer["interest_count"][3] == 2
    with pytest.raises(UserError, match="would tell an earlier moment what came later"):
        past_interests(past.connection, past.generation, users[:1], [MOMENT - timedelta(microseconds=1)])


def test_whatever_happens_later_changes_nothing(past: Past) -> None:
    """The leak test: other events from the moment on, to the very microsecond, and everything is equal to the byte."""
    connection = past.connection
    before = vectors(connection, past.generation), gates(connection, past.generation)
    measured = evaluate_generation(connection, past.generation)
    connection.execute("delete from interactions where occurred_at >= %s", [MOMENT])
    planted = [(f"u{n % 40}", f"i{n % 3}", MOMENT) for n in range(40)]
    planted += [("stranger", "i59", MOMENT), ("stranger", "i58", datetime(2024, 3, 1, tzinfo=UTC))]
    with connection.cursor() as cursor:
        cursor.executemany(
            """insert into interactions (user_id, item_id, occurred_at, event_id)
               values (%s, %s, %s, gen_random_uuid()::text)""",
            planted,
        )
    connection.commit()
    refresh_sequences(connection, *(changed_days(connection) or ()))
    again = train(connection, past.home, "others")
    assert not again.reused
    assert (again.directory.name, again.sha256) == (past.checkpoint.directory.name, past.checkpoint.sha256)
    assert build(connection, again.directory) == past.generation  # found: its identity is the same
    lifecycle.drop(connection, past.generation)
    made = build(connection, again.directory)
    assert made != past.generation
    after = vectors(connection, made), gates(connection, made)
    assert before == after
    assert "stranger" not in {row[0] for row in after[0].values()}
    assert after[0]["i59"][3] is None  # i59 has content alone: nobody met it before the moment
    assert evaluate_generation(connection, made).metrics == measured.metrics


def test_one_microsecond_later_it_counts(past: Past) -> None:
    """The test above can fail: an event before the moment makes another training set."""
    connection = past.connection
    connection.execute(
        """insert into interactions (user_id, item_id, occurred_at)
           values ('u1', 'i2', %s - interval '1 microsecond')""",
        [MOMENT],
    )
    assert train(connection, past.home, "others").directory.name != past.checkpoint.directory.name
    connection.rollback()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_flow_makes_one_beside_the_live_one(platform: str, tmp_path: Path) -> None:
    options = {"epochs": 1}
    with dg.DagsterInstance.ephemeral() as instance, connect(platform) as connection:
        given: dict[str, Any] = {"progress": False, "instance": instance}
        folder = str(tiny_folder(tmp_path / "data"))
        first = materialize(folder=folder, preset="tiny", options=options, before=MOMENT, **given)
        assert (first["generation"], first["state"]) == (1, "ready")
        assert first["assets"]["training_set"]["events before"] == MOMENT.isoformat()
        assert lifecycle.live(connection) is None
        with pytest.raises(UserError, match="does not go live by itself"):
            materialize(until="live", before=MOMENT, **given)
        with pytest.raises(UserError, match="knows no event from 2024-01-01T00:00:00"):
            materialize(selection=["live_generation"], **given)
        second = materialize(preset="tiny", options=options, **given)
        assert (second["generation"], second["state"]) == (2, "live")
        assert lifecycle.get(connection, 2).trained_before is None
        # Without a preset the live generation's recipe is kept, and found again.
        third = materialize(**given)
        assert (third["generation"], third["recipe"]["preset"], third["recipe"]["options"]) == (2, "tiny", options)
        runs = len(instance.get_runs())
        with pytest.raises(UserError, match="no preset 'tinny'"):
            materialize(preset="tinny", **given)
        with pytest.raises(UserError, match="no fusion 'x'"):
            materialize(options={"towers.fusion": "x"}, **given)
        assert len(instance.get_runs()) == runs  # refused before any work
    assert np.isfinite(second["seconds"]["generation"])

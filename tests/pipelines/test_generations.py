"""A generation's life: filled, promoted, rolled back, dropped; never two live, never a half-built one seen."""

import json
from typing import Any

import numpy as np
import psycopg
import pytest
from click.testing import CliRunner

from pipelines.generation import lifecycle
from pipelines.generation.partitions import InterestRows, fill, halfvecs
from polytower import locks
from polytower.cli import cli
from polytower.errors import UserError
from polytower.postgres import connect

DIM = 8


def build(
    connection: psycopg.Connection[Any], *, items: int = 30, users: int = 5, seed: int = 0, **quality: Any
) -> int:
    """A ready generation of random unit vectors; every third item is cold."""
    generation = lifecycle.begin(
        connection,
        dim=DIM,
        interests=2,
        config={"preset": "test"},
        metrics={},
        checkpoint_path="",
        checkpoint_sha256="",
    )
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((items, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    everything, warm = np.ones(items, bool), np.arange(items) % 3 != 0
    rows = zip(
        (f"i{item}" for item in range(items)),
        halfvecs(vectors, everything), halfvecs(vectors, everything), halfvecs(vectors, warm), strict=True,
    )  # fmt: skip
    owners, numbers = np.repeat(np.arange(users), 2), np.tile(np.arange(2), users)
    interests = InterestRows(
        [f"u{user}" for user in owners],
        numbers,
        vectors[owners + numbers].astype(np.float32),
        np.full(2 * users, 0.5, np.float32),
        np.full(2 * users, 1_704_067_200_000_000),
        np.full(2 * users, 3),
    )
    fill(connection, generation, rows, [interests])
    lifecycle.ready(connection, generation, quality or {"passed": True, "gates": []})
    return generation


def begin(connection: psycopg.Connection[Any]) -> int:
    """A generation that is being built."""
    return lifecycle.begin(
        connection, dim=DIM, interests=1, config={}, metrics={}, checkpoint_path="", checkpoint_sha256=""
    )


def states(connection: psycopg.Connection[Any]) -> dict[int, str]:
    return {found.generation: found.state for found in lifecycle.listing(connection)}


def test_interests_are_written_as_they_are_whatever_the_user_is_called(connection: psycopg.Connection[Any]) -> None:
    generation = lifecycle.begin(
        connection, dim=3, interests=1, config={}, metrics={}, checkpoint_path="", checkpoint_sha256=""
    )
    names = ["ü", "a\tb\n", "NULL", "x" * 400, "", "\\."]
    vectors = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = np.linspace(0, 1, 6, dtype=np.float32)
    times = np.array([0, 1, -1, 1_704_067_200_123_456, 2**48, 946_684_800_000_000])
    events = np.array([0, 1, 2, 3, 2**40, 5])
    blocks = [
        InterestRows(names[part], np.arange(6)[part], vectors[part], weights[part], times[part], events[part])
        for part in (slice(0, 4), slice(4, 4), slice(4, 6))
    ]
    assert fill(connection, generation, [], blocks) == {"item_embeddings": 0, "user_interests": 6}
    found = connection.execute(
        "select user_id, interest, embedding, weight, (extract(epoch from as_of) * 1000000)::bigint, events"
        " from user_interests where generation = %s order by interest",
        [generation],
    ).fetchall()
    assert [row[0] for row in found] == names
    assert [row[1] for row in found] == [*range(6)]
    np.testing.assert_array_equal(
        np.stack([row[2].to_numpy() for row in found]).astype(np.float16), vectors.astype(np.float16)
    )
    np.testing.assert_array_equal(np.array([row[3] for row in found], np.float32), weights)
    assert [row[4] for row in found] == times.tolist()
    assert [row[5] for row in found] == events.tolist()


def test_promote_then_promote_another_then_roll_back(connection: psycopg.Connection[Any]) -> None:
    first, second = build(connection), build(connection, seed=1)
    assert lifecycle.promote(connection, first) is None
    before = lifecycle.promote(connection, second)
    assert before is not None
    assert before.generation == first
    assert states(connection) == {first: "retired", second: "live"}
    assert lifecycle.rollback(connection).generation == first
    assert states(connection) == {first: "live", second: "retired"}
    windows = connection.execute("select generation, live_until is null from promotions order by promotion").fetchall()
    assert windows == [(first, False), (second, False), (first, True)]


def test_promoting_the_live_one_again_changes_nothing(connection: psycopg.Connection[Any]) -> None:
    generation = build(connection)
    lifecycle.promote(connection, generation)
    lifecycle.promote(connection, generation)
    assert connection.execute("select count(*) from promotions").fetchone() == (1,)


def test_a_reader_sees_the_old_generation_until_the_commit(connection: psycopg.Connection[Any], database: str) -> None:
    first, second = build(connection), build(connection, seed=1)
    lifecycle.promote(connection, first)
    connection.commit()
    with connect(database) as reader:
        lifecycle.switch(connection, second)
        before = lifecycle.live(reader)
        connection.commit()
        after = lifecycle.live(reader)
    assert before is not None
    assert after is not None
    assert (before.generation, after.generation) == (first, second)


def test_cold_items_have_no_id_embedding_and_every_space_is_indexed(connection: psycopg.Connection[Any]) -> None:
    generation = build(connection)
    cold = connection.execute(
        "select count(*) from item_embeddings where generation = %s and id_embedding is null", [generation]
    ).fetchone()
    assert cold == (10,)
    indexes = connection.execute(
        "select count(*) from pg_indexes where tablename = %s and indexdef like '%%hnsw%%'",
        [f"item_embeddings_g{generation}"],
    ).fetchone()
    assert indexes == (3,)


def test_a_failed_gate_blocks_promotion_unless_forced(connection: psycopg.Connection[Any]) -> None:
    gate = {"name": "dead_dimensions", "value": 5, "threshold": 0, "passed": False, "severity": "error"}
    generation = build(connection, passed=False, gates=[gate])
    with pytest.raises(UserError, match="dead_dimensions is 5"):
        lifecycle.promote(connection, generation)
    assert lifecycle.live(connection) is None
    lifecycle.promote(connection, generation, force=True)
    assert states(connection) == {generation: "live"}


def test_a_build_that_was_killed_is_swept_by_the_next(connection: psycopg.Connection[Any]) -> None:
    killed = begin(connection)
    generation = build(connection)
    assert states(connection) == {killed: "failed", generation: "ready"}
    with pytest.raises(UserError, match="is failed"):
        lifecycle.promote(connection, killed)


def test_the_live_one_is_not_dropped_and_a_dropped_one_does_not_come_back(connection: psycopg.Connection[Any]) -> None:
    first, second = build(connection), build(connection, seed=1)
    lifecycle.promote(connection, first)
    with pytest.raises(UserError, match="is live"):
        lifecycle.drop(connection, first)
    lifecycle.promote(connection, second)
    lifecycle.drop(connection, first)
    with pytest.raises(UserError, match="was dropped"):
        lifecycle.promote(connection, first)
    with pytest.raises(UserError, match="nothing to roll back to"):
        lifecycle.rollback(connection)


def test_only_the_newest_past_generations_are_retained(connection: psycopg.Connection[Any]) -> None:
    built = [build(connection, seed=seed) for seed in range(4)]
    lifecycle.promote(connection, built[0])
    lifecycle.promote(connection, built[3])
    lifecycle.fail(connection, begin(connection), "a failed build has no vectors and takes nobody's place")
    found = lifecycle.surplus(connection, keep=1)
    assert [(each.generation, each.state) for each in found] == [(built[1], "ready"), (built[0], "retired")]
    assert all(each.bytes > 8192 for each in found)
    assert lifecycle.retain(connection, keep=1) == found
    assert [lifecycle.has_partitions(connection, number) for number in built] == [False, False, True, True]
    assert lifecycle.retain(connection, keep=1) == []


def test_the_command_tells_what_it_would_delete_and_then_deletes_it(
    platform: str, connection: psycopg.Connection[Any]
) -> None:
    first, second = build(connection), build(connection, seed=1)
    lifecycle.promote(connection, second)
    arguments = ["generations", "retain", "--keep", "0", "--json"]
    told, done, again = (
        json.loads(CliRunner().invoke(cli, [*arguments, *more]).stdout) for more in (["--dry-run"], [], [])
    )
    assert told == done | {"dry_run": True}
    assert [each["generation"] for each in done["generations"]] == [first]
    assert done["bytes"] > 0
    assert again == {"dry_run": False, "generations": [], "bytes": 0}
    assert states(connection) == {first: "ready", second: "live"}
    assert CliRunner().invoke(cli, ["generations", "retain"]).exit_code == 2


def test_nothing_to_roll_back_and_unknown_numbers_are_said_plainly(connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(UserError, match="no generation is live"):
        lifecycle.rollback(connection)
    with pytest.raises(UserError, match="no generation 7"):
        lifecycle.promote(connection, 7)


def test_diff_counts_and_churn(connection: psycopg.Connection[Any]) -> None:
    first, same, other = build(connection), build(connection, items=33), build(connection, seed=1)
    connection.commit()
    found = lifecycle.diff(connection, first, same)
    assert found["items"] == {"added": 3, "removed": 0, "kept": 30}
    assert found["users"] == {"added": 0, "removed": 0, "kept": 5}
    assert lifecycle.neighbour_churn(connection, first, first) == 0
    churn = lifecycle.neighbour_churn(connection, first, other)
    assert churn is not None
    assert churn > 0.3


def test_a_second_builder_is_told_whose_turn_it_is(
    connection: psycopg.Connection[Any], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "GRACE", 0.1)
    with connect(database) as other, lifecycle.exclusive(connection):
        mine = f"Postgres process {connection.info.backend_pid}"
        with pytest.raises(UserError, match=f"polytower.build is held by .*{mine}"), lifecycle.exclusive(other):
            pass
    with connect(database) as other, lifecycle.exclusive(other):
        pass


def test_a_builder_may_be_ended(database: str) -> None:
    with psycopg.connect(database) as first:
        first.execute("select pg_advisory_lock(hashtextextended(%s, 0))", [locks.BUILD])
        first.commit()
        with connect(database) as second, lifecycle.exclusive(second, take_over=True):
            assert locks.holder(second, locks.BUILD) is None
        with pytest.raises(psycopg.OperationalError):
            first.execute("select 1")

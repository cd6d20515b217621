"""The harness can fail: each kind of loss is planted and found; what is sound is called sound."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from pipelines.generation.lifecycle import amends
from pipelines.load.folder import load_folder
from tests.faults import checks
from tests.faults.__main__ import verdict
from tests.faults.data import USERS, Batches
from tests.faults.home import MARK, Home
from tests.faults.ledger import Ledger
from tests.faults.rounds import Round
from tests.generation_factory import Synthetic, unit, write_generation


@pytest.fixture
def ledger(connection: psycopg.Connection[Any], tmp_path: Path) -> Ledger:
    """Of one load that was acknowledged, and one that was never begun."""
    batches, ledger = Batches(tmp_path / "data", 0), Ledger()
    first, second = (batches.write(items=4, events=8, edge=8) for _ in range(2))
    load_folder(connection, first.folder, first.folder / "images")
    ledger.acknowledge(ledger.send(first.events), first.items)
    ledger.send(second.events)
    return ledger


@pytest.fixture
def live(connection: psycopg.Connection[Any]) -> int:
    """A live generation, promoted as the platform does it."""
    random = np.random.default_rng(0)
    users = {f"u{n}": unit(random.standard_normal((2, 8))) for n in (0, USERS // 2, USERS - 1)}
    vectors = unit(random.standard_normal((20, 8)))
    number = write_generation(connection, Synthetic([f"x{n}" for n in range(20)], vectors, users))
    connection.execute("insert into promotions (generation) values (%s)", [number])
    connection.commit()
    return number


def told(faults: list[checks.Fault]) -> str:
    return "\n".join(f"{fault.kind}: {fault.text}" for fault in faults)


def test_what_was_acknowledged_is_all_there(connection: psycopg.Connection[Any], ledger: Ledger) -> None:
    assert checks.data(connection, ledger) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("delete from interactions where user_id = 'u3'", "lost: 1 acknowledged events are gone"),
        ("delete from items where item_id = 'i2'", "lost: 1 acknowledged items"),
        ("update items set image_sha256 = '' where item_id = 'i2'", "lost: 1 acknowledged items"),
        (
            "insert into interactions (user_id, item_id, occurred_at, event_id)"
            " values ('u1', 'i1', '2024-03-05', 'p1'), ('u1', 'i1', '2024-03-06', 'p1')",
            "lost: 1 events are there more than once",
        ),
        (
            "insert into interactions (user_id, item_id, occurred_at) values ('u1', 'i1', '2024-03-05')",
            "lost: 1 events are there that nobody sent",
        ),
    ],
)
def test_a_planted_loss_is_found(connection: psycopg.Connection[Any], ledger: Ledger, planted: str, found: str) -> None:
    connection.execute("select ensure_interactions_year(2024)")
    connection.execute(planted)
    assert found in told(checks.data(connection, ledger))


def test_half_a_load_is_found(connection: psycopg.Connection[Any], ledger: Ledger) -> None:
    user, item, time = sorted(ledger.open[0])[0]
    connection.execute("select ensure_interactions_year(2024)")
    statement = "insert into interactions (user_id, item_id, occurred_at) values (%s, %s, %s)"
    connection.execute(statement, [user, item, time])
    assert "1 of the 8 events of one unanswered load or request are there" in told(checks.data(connection, ledger))


def test_one_live_generation_is_sound(connection: psycopg.Connection[Any], live: int) -> None:
    assert checks.generation(connection) == []
    assert checks.answers(connection) == []
    assert checks.live_generations(connection) == 1


def test_no_promotion_yet_is_sound(connection: psycopg.Connection[Any]) -> None:
    assert checks.generation(connection) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("update generations set state = 'retired'", "live: live generations: []"),
        ("update promotions set live_until = live_from + interval '1 s'", "live: generation [1] is live, the promo"),
        (
            "drop index generations_live_idx; insert into generations (dim, interests, state) values (8, 2, 'live')",
            "live: live generations: [1, 2]",
        ),
    ],
)
def test_a_planted_confusion_of_generations_is_found(
    connection: psycopg.Connection[Any], live: int, planted: str, found: str
) -> None:
    connection.execute(planted)
    assert found in told(checks.generation(connection))


def test_silence_is_found(connection: psycopg.Connection[Any], live: int) -> None:
    amends(connection)
    connection.execute("delete from user_interests where user_id = 'u0'")
    assert "lost: no answer for u0" in told(checks.answers(connection))


def test_pictures_and_items_left_out_are_found(connection: psycopg.Connection[Any], ledger: Ledger, live: int) -> None:
    found = told(checks.complete(connection, placed=True))
    assert "24 items are without its picture's embedding" in found
    assert "4 items are not in the generation, such as i0" in found


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("create table item_embeddings_g9 (like item_embeddings)", "stuck: the table item_embeddings_g9 is left over"),
        ("update generations set state = 'failed'", "stuck: the table user_interests_g1 is left over"),
        ("create table interactions_y1999 (like interactions)", "stuck: the table interactions_y1999 is left over"),
        ("insert into generations (dim, interests) values (8, 2)", "stuck: generation 2 is unfinished"),
        ("insert into loads (source) values ('d')", "stuck: load 1 is unfinished"),
    ],
)
def test_planted_leftovers_are_found(
    connection: psycopg.Connection[Any], live: int, tmp_path: Path, planted: str, found: str
) -> None:
    home = Home(tmp_path)
    assert checks.leftovers(connection, home) == []
    connection.execute(planted)
    assert found in told(checks.leftovers(connection, home))


def test_unfinished_checkpoints_are_found(connection: psycopg.Connection[Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "tiny-1"
    folder.mkdir(parents=True)
    (folder / "towers.partial").touch()
    found = told(checks.leftovers(connection, Home(tmp_path)))
    assert "stuck: checkpoints/tiny-1/towers.partial is left over" in found
    assert "stuck: the checkpoint tiny-1 is unfinished" in found
    (folder / "towers.partial").unlink()
    (folder / "summary.json").touch()
    assert checks.leftovers(connection, Home(tmp_path)) == []


def test_an_orphan_is_found(database: str, tmp_path: Path) -> None:
    home = Home(tmp_path, database)
    assert checks.orphans(home, grace=0) == []
    orphan = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={MARK: home.mark},
    )  # fmt: skip
    assert orphan.stdout is not None
    orphan.stdout.readline()
    try:
        assert f"stuck: process {orphan.pid} outlives its command" in told(checks.orphans(home, grace=0))
        assert checks.orphans(home, frozenset([orphan.pid]), grace=0) == []
    finally:
        home.sweep()
        orphan.communicate()
    assert checks.orphans(home, grace=0) == []
    home.close()


def test_an_orphaned_lock_is_found(database: str, connection: psycopg.Connection[Any], tmp_path: Path) -> None:
    home = Home(tmp_path, database)
    connection.execute("select pg_advisory_lock(7)")
    found = told(checks.orphans(home, grace=0))
    assert "is idle in transaction: 'select pg_advisory_lock(7)'" in found
    assert "still holds a lock: 'select pg_advisory_lock(7)'" in found
    home.close()


def test_the_verdict_is_one_line_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict([Round("load"), Round("train")], 1) == 0
    assert capsys.readouterr().out == "rounds=2 lost=0 stuck=0 live_generations=1\n"
    faulty = Round("load", faults=[checks.Fault("lost", "an event"), checks.Fault("stuck", "a lock")])
    assert verdict([faulty], 1) == 1
    assert capsys.readouterr().out == "rounds=1 lost=1 stuck=1 live_generations=1\n"
    assert verdict([Round("load")], 2) == 1

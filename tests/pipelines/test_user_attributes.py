"""Users' attributes from the table `users` to the answer: a build, SQL and HTTP say the same of the same user."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from fastapi.testclient import TestClient
from psycopg.types.json import Jsonb

from encoders.content.attributes import user_vectors
from encoders.evaluation.evaluate import context_of, padded
from encoders.training import checkpoint
from pipelines.generation import lifecycle
from pipelines.generation.build import build
from pipelines.generation.evaluation import evaluate_generation
from pipelines.generation.training import Checkpoint, aligned, read_snapshot, train_checkpoint
from pipelines.generation.training_set import read_catalogue, read_training_set
from pipelines.load.folder import load_folder
from polytower.postgres import connect
from serving.http.app import create_app
from tests.factories import tiny_folder, write_rows

WIDTH = 32
OPTIONS = {"towers.user_attributes": WIDTH, "towers.silent_users": 0.5, "learning_rate": 1e-2}
IDLE = {"age": 33, "city": "Oslo", "tags": ["a", "b"], "member": True, "height": 1.8, "zip": "02139", "code": "33"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def opened(module_database: str, home: Path) -> Iterator[psycopg.Connection[Any]]:
    """A loaded database: forty users with events, one without; u1 says nothing."""
    folder = tiny_folder(home / "data")
    users = [{"user_id": f"u{n}", "age": 20 + n, "city": ("Oslo", "Lima")[n % 2]} for n in range(40) if n != 1]
    write_rows(folder / "users.jsonl", [*users, {"user_id": "idle", **IDLE}, {"user_id": "blank"}])
    (folder / "users.parquet").unlink()
    with connect(module_database) as connection:
        load_folder(connection, folder)
        yield connection


@pytest.fixture(scope="module")
def trained(opened: psycopg.Connection[Any], home: Path) -> Checkpoint:
    return train(opened, home)


@pytest.fixture(scope="module")
def generation(opened: psycopg.Connection[Any], trained: Checkpoint) -> int:
    number = build(opened, trained.directory)
    lifecycle.promote(opened, number)
    return number


@pytest.fixture(scope="module")
def client(module_database: str, generation: int) -> Iterator[TestClient]:
    with TestClient(create_app(module_database), raise_server_exceptions=False) as client:
        yield client


def train(connection: psycopg.Connection[Any], home: Path) -> Checkpoint:
    data = read_training_set(connection, WIDTH)
    return train_checkpoint(data, "tiny", home / "checkpoints", options=OPTIONS, device="cpu")


def retrieved(client: TestClient, **question: Any) -> tuple[str, dict[str, float]]:
    """(where the interests came from, {item: score}), seen items included."""
    answer = client.post("/v1/retrieve", json={**question, "k": 1000, "exclude_seen": False})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["interests"], {row["item_id"]: row["score"] for row in body["candidates"]}


def close(one: dict[str, float], other: dict[str, float]) -> bool:
    return one.keys() == other.keys() and all(abs(one[item] - other[item]) < 3e-3 for item in one)


def test_the_training_set_knows_every_user_who_is_known(opened: psycopg.Connection[Any]) -> None:
    assert read_training_set(opened).histories.attributes is None
    histories = read_training_set(opened, WIDTH).histories
    assert (histories.user_ids[-1], histories.lengths[-1], len(histories)) == ("idle", 0, 41)
    assert histories.attributes is not None
    stored = dict(opened.execute("select user_id, attributes from users").fetchall())
    expected = user_vectors([stored.get(user, {}) for user in histories.user_ids], WIDTH)
    np.testing.assert_array_equal(histories.attributes, expected)
    assert not histories.attributes[histories.user_ids.index("u1")].any()


def test_the_snapshot_keeps_them_and_is_evaluated_with_them(
    opened: psycopg.Connection[Any], trained: Checkpoint, generation: int
) -> None:
    _, histories = read_snapshot(trained.directory)
    assert histories.attributes is not None
    assert "idle" not in histories.user_ids
    np.testing.assert_array_equal(histories.attributes, read_training_set(opened, WIDTH).histories.active().attributes)
    assert trained.towers.reads == ("attributes",)
    assert evaluate_generation(opened, generation).questions == 40


def test_the_build_stores_what_the_tower_says_of_all_of_them(
    opened: psycopg.Connection[Any], trained: Checkpoint, generation: int
) -> None:
    item_ids, _ = read_snapshot(trained.directory)
    histories = read_training_set(opened, WIDTH).histories
    towers, _, _ = checkpoint.load(trained.directory, aligned(read_catalogue(opened)[0], item_ids))
    assert towers.user_tower.attributes is not None
    assert towers.user_tower.attributes.weight.abs().sum() > 0
    rows, mask = padded(histories, towers.config.history)
    found = towers.user_interests(towers.item_embeddings().item[rows], mask, context_of(histories, towers.config))
    stored = opened.execute(
        "select user_id, interest, embedding, as_of from user_interests where generation = %s", [generation]
    ).fetchall()
    assert len(stored) == 41 * towers.config.interests
    for user_id, interest, embedding, as_of in stored:
        expected = found.vectors[histories.user_ids.index(user_id), interest]
        np.testing.assert_allclose(embedding.to_numpy(), expected, atol=1e-3)
        assert (as_of == datetime(1970, 1, 1, tzinfo=UTC)) == (user_id == "idle")


def test_online_is_the_build(opened: psycopg.Connection[Any], client: TestClient, generation: int) -> None:
    for user in ("u0", "u1", "idle"):
        source, stored = retrieved(client, user_id=user)
        assert source == "stored"
        lifecycle.amends(opened)
        kept = opened.execute(
            "delete from user_interests where generation = %s and user_id = %s returning *", [generation, user]
        ).fetchall()
        opened.commit()
        source, online = retrieved(client, user_id=user)
        assert source == "online"
        assert close(online, stored)
        lifecycle.amends(opened)
        opened.cursor().executemany("insert into user_interests values (%s, %s, %s, %s, %s, %s, %s)", kept)
        opened.commit()


def test_a_question_may_bring_the_attributes(opened: psycopg.Connection[Any], client: TestClient) -> None:
    events = opened.execute("select item_id from interactions where user_id = 'u0' order by occurred_at, position")
    history = [item for (item,) in events]
    row = opened.execute("select attributes from users where user_id = 'u0'").fetchone()
    assert row is not None
    opened.rollback()
    _, stored = retrieved(client, user_id="u0")
    assert close(retrieved(client, history=history, attributes=row[0])[1], stored)
    assert not close(retrieved(client, history=history)[1], stored)
    assert close(retrieved(client, attributes=IDLE)[1], retrieved(client, user_id="idle")[1])
    assert close(retrieved(client, history=["gone"], attributes=IDLE)[1], retrieved(client, user_id="idle")[1])


def test_a_user_who_came_after_the_build_is_answered(opened: psycopg.Connection[Any], client: TestClient) -> None:
    assert client.post("/v1/retrieve", json={"user_id": "late"}).status_code == 404
    opened.execute("insert into users (user_id, attributes) values ('late', %s)", [Jsonb(IDLE)])
    opened.commit()
    source, found = retrieved(client, user_id="late")
    assert source == "online"
    assert close(found, retrieved(client, user_id="idle")[1])
    assert client.post("/v1/retrieve", json={"user_id": "blank"}).status_code == 404


def test_changed_attributes_are_another_training_and_another_generation(
    opened: psycopg.Connection[Any], trained: Checkpoint, generation: int, home: Path
) -> None:
    assert train(opened, home).reused
    opened.execute("delete from users where user_id = 'late'")
    assert build(opened, trained.directory) == generation
    opened.execute("update users set attributes = attributes || '{\"city\": \"Lagos\"}' where user_id = 'u0'")
    opened.commit()
    later = build(opened, trained.directory)
    assert later != generation
    moved = opened.execute(
        """select user_id, max(one.embedding <=> two.embedding) > 1e-4
           from user_interests one join user_interests two using (user_id, interest)
           where one.generation = %s and two.generation = %s group by 1""",
        [generation, later],
    ).fetchall()
    assert [user for user, differs in moved if differs] == ["u0"]
    assert not train(opened, home).reused


def test_a_tower_that_reads_none_refuses_attributes_alone(
    opened: psycopg.Connection[Any], client: TestClient, home: Path
) -> None:
    plain = train_checkpoint(read_training_set(opened), "tiny", home / "checkpoints", device="cpu")
    lifecycle.promote(opened, build(opened, plain.directory))
    answer = client.post("/v1/retrieve", json={"attributes": IDLE})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/unknown-history")
    assert "reads no attributes" in answer.json()["detail"]
    assert client.post("/v1/retrieve", json={"user_id": "idle"}).status_code == 404

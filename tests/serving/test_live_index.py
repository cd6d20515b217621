"""A server's index: loaded in the background, right for exactly one state, and given up without harm."""

import asyncio
from typing import Any

import httpx
import psycopg
import pytest
from fastapi.testclient import TestClient

from polytower.errors import UserError
from polytower.postgres import connect
from serving.http.app import create_app
from serving.memory import vector_index
from serving.memory.exact import Exact
from serving.memory.live_index import LiveIndex
from serving.metrics import ServerMetrics
from tests.generation_factory import Synthetic, write_generation

QUESTION = {"user_id": "ada", "k": 9, "fields": ["title"]}


def _by(client: TestClient) -> dict[str, float]:
    """Searches so far, by what answered them."""
    lines = client.get("/metrics").text.splitlines()
    counts = [line.split('by="')[1].split('"} ') for line in lines if line.startswith("polytower_searches_total")]
    return {by: float(count) for by, count in counts}


def _settle(client: TestClient) -> None:
    """Waits for the load that is going on in the client's server."""
    assert client.portal is not None
    client.portal.call(client.app.state.services.index.settled)  # type: ignore[attr-defined]


def _ask(client: TestClient, **question: Any) -> dict[str, Any]:
    answer: httpx.Response = client.post("/v1/retrieve", json={**QUESTION, **question})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_memory_follows_promotions_and_items(own: str, own_client: TestClient, small: Synthetic) -> None:
    _settle(own_client)
    first = _ask(own_client)
    assert _by(own_client) == {"memory": 1}

    with connect(own) as connection:
        newer = write_generation(connection, small)
    by_sql = _ask(own_client)
    assert _by(own_client) == {"memory": 1, "sql": 1}
    assert (by_sql["generation"], by_sql["candidates"]) == (newer, first["candidates"])
    _settle(own_client)
    assert _ask(own_client) == by_sql
    assert _by(own_client) == {"memory": 2, "sql": 1}

    best = first["candidates"][0]["item_id"]
    with connect(own) as connection:
        connection.execute("update items set available = false where item_id = %s", [best])
        connection.execute("update items set title = 'New' where item_id = %s", [first["candidates"][1]["item_id"]])
    for turn in ("sql", "memory"):
        found = _ask(own_client)["candidates"]
        assert best not in {row["item_id"] for row in found}, turn
        assert found[0]["title"] == "New"
        _settle(own_client)
    assert _by(own_client) == {"memory": 3, "sql": 2}


def test_a_transaction_that_is_rolled_back_changes_nothing(own: str, own_client: TestClient) -> None:
    _settle(own_client)
    with connect(own) as connection:
        connection.execute("update items set available = false")
        connection.rollback()
    _ask(own_client)
    assert _by(own_client) == {"memory": 1}


@pytest.mark.parametrize(("limit", "reason"), [("0", "wanted"), ("1", "small")])
def test_sql_answers_without_an_index(
    own: str, monkeypatch: pytest.MonkeyPatch, limit: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    if reason == "small":
        with connect(own) as connection:
            connection.execute("update pg_class set reltuples = 1e5 where oid = 'item_embeddings_g1'::regclass")
    monkeypatch.setenv("POLYTOWER_INDEX_MB", limit)
    with TestClient(create_app(own)) as client:
        _settle(client)
        assert len(_ask(client)["candidates"]) == 9
        assert _by(client) == {"sql": 1}
    assert ("more than 1 MiB" in caplog.text) == (reason == "small")


def test_threads_of_a_search_are_a_setting(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_SEARCH_THREADS", "2")
    with TestClient(create_app(own)) as client:
        _settle(client)
        index = client.app.state.services.index.current(1, _version(own))  # type: ignore[attr-defined]
        assert index.vector_index.threads == 2
    monkeypatch.setenv("POLYTOWER_SEARCH_THREADS", "0")
    with pytest.raises(UserError, match="POLYTOWER_SEARCH_THREADS='0' must be a whole number of at least 1"):
        create_app(own)


def test_a_toy_index_serves(own: str, own_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, chosen by the setting, and answering: nothing else knows of it."""
    asked = []

    class Toy(Exact):
        def scan(self, *question: Any) -> Any:
            asked.append(question)
            return super().scan(*question)

    monkeypatch.setattr(vector_index, "VECTOR_INDEXES", {**vector_index.VECTOR_INDEXES, "toy": Toy})
    monkeypatch.setenv("POLYTOWER_VECTOR_INDEX", "toy")
    with TestClient(create_app(own)) as client:
        _settle(client)
        assert _ask(client) == _ask(own_client)
        assert _by(client) == {"memory": 1}
    assert asked
    monkeypatch.setenv("POLYTOWER_VECTOR_INDEX", "toys")
    with pytest.raises(UserError, match="POLYTOWER_VECTOR_INDEX='toys' is not a vector index; there are exact, invert"):
        create_app(own)


def _version(url: str) -> int:
    with connect(url) as connection:
        row = connection.execute("select version from item_version").fetchone()
    assert row is not None
    return int(row[0])


def test_postgres_away_while_loading(caplog: pytest.LogCaptureFixture) -> None:
    async def load() -> None:
        indexes = LiveIndex("postgresql://nobody@127.0.0.1:1/nothing", ServerMetrics(), limit=1 << 30)
        indexes.refresh()
        assert await indexes.settled() is None
        assert indexes.current(1, 0) is None  # not tried again at once
        await indexes.close()

    asyncio.run(load())
    assert caplog.text.count("SQL answers") == 1


def test_many_changes_in_one_transaction_are_one_change(own: str) -> None:
    version = "select version from item_version"
    with connect(own) as connection:
        cursor = connection.cursor()
        cursor.execute("update item_version set version = 100")
        cursor.executemany("insert into items (item_id) values (%s)", [[f"many{n}"] for n in range(100)])
        assert cursor.execute(version).fetchone() == (101,)
        connection.commit()
        cursor.execute("delete from items where item_id = 'many1'")
        assert cursor.execute(version).fetchone() == (102,)


def test_items_change_their_version_with_the_transaction(connection: psycopg.Connection[Any]) -> None:
    version = "select version from item_version"
    before = connection.execute(version).fetchone()
    with connection.transaction(force_rollback=True):
        connection.execute("insert into items (item_id) values ('x')")
    assert connection.execute(version).fetchone() == before
    connection.execute("insert into items (item_id) values ('x')")
    connection.execute("delete from items where item_id = 'x'")
    after = connection.execute(version).fetchone()
    assert before is not None
    assert after == (before[0] + 1,)
    connection.rollback()
    assert connection.execute(version).fetchone() == before

"""Bad input, missing parts and full servers: each a typed problem response (RFC 9457), never a stack trace."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import psycopg
import pytest
from fastapi.testclient import TestClient
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from polytower.postgres import connect
from serving.http.app import Caps, create_app
from serving.http.limits import Limits
from serving.metrics import ServerMetrics

UNIT = [1, 0, 0, 0, 0, 0, 0, 0]


def _problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert ("retry-after" in response.headers) == (status in (429, 503))
    body: dict[str, Any] = response.json()
    assert body["type"] == f"/problems/{slug}"
    assert body["status"] == status
    assert body["detail"]
    assert "Traceback" not in response.text
    assert "PL/pgSQL" not in response.text
    return body


@pytest.mark.parametrize(
    ("question", "status", "slug"),
    [
        ({"user_id": "nobody"}, 404, "unknown-user"),
        ({"user_id": "x'; drop table items; --"}, 404, "unknown-user"),
        ({"user_id": "ada", "k": 0}, 422, "invalid-request"),
        ({"user_id": "ada", "k": 1001}, 422, "invalid-request"),
        ({"user_id": "ada", "k": "10"}, 422, "invalid-request"),
        ({"user_id": ""}, 422, "invalid-request"),
        ({"user_id": "a\x00b"}, 422, "invalid-request"),
        ({"user_id": "ada", "typo": 1}, 422, "invalid-request"),
        ({"user_id": "ada", "merge": "product"}, 422, "invalid-request"),
        ({}, 422, "invalid-request"),
        ({"user_id": "ada", "history": ["i01"]}, 422, "invalid-request"),
        ({"user_id": "ada", "weights": [1]}, 422, "invalid-request"),
        ({"user_id": "ada", "filter": {"gnere": 1}}, 422, "unknown-attribute"),
        ({"user_id": "ada", "filter": {"genres": ["Comedy"]}}, 422, "malformed-filter"),
        ({"user_id": "ada", "filter": {"year": {"gte": "1990"}}}, 422, "malformed-filter"),
        ({"user_id": "ada", "filter": {"genres": "Comedy", "year": "1990"}}, 422, "malformed-filter"),
        ({"user_id": "ada", "filter": {"genres": {"any": [1, True]}}, "allow": ["i01"]}, 422, "malformed-filter"),
        ({"user_id": "ada", "filter": {"genres": "a\x00b"}}, 422, "unreadable-value"),
        ({"vectors": [[1, 2, 3]]}, 422, "wrong-dimension"),
        ({"vectors": [[]]}, 422, "invalid-request"),
        ({"vectors": [UNIT], "weights": [1, 2]}, 422, "wrong-dimension"),
        ({"vectors": [UNIT], "weights": [-1]}, 422, "weights-not-usable"),
        ({"vectors": [[1e30, *UNIT[1:]]]}, 422, "unreadable-value"),
        ({"history": ["unknown", "x'; --"]}, 422, "unknown-history"),
        ({"history": ["i01"]}, 503, "no-user-tower"),
        ({"history": []}, 422, "invalid-request"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_retrieve_refuses(client: TestClient, question: dict[str, Any], status: int, slug: str) -> None:
    _problem(client.post("/v1/retrieve", json=question), status, slug)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"vectors": [[NaN, 0, 0, 0, 0, 0, 0, 0]]}',
        b'{"vectors": [[1e999, 0, 0, 0, 0, 0, 0, 0]]}',
        b'{"user_id": "\\ud800"}',
        b"\xff\xfe",
    ],
)
def test_unreadable_bodies(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/retrieve", content=body, headers={"content-type": "application/json"})
    _problem(answer, 400 if answer.status_code == 400 else 422, "invalid-request")


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "json", ""])
def test_a_body_that_is_not_declared_as_json(client: TestClient, kind: str) -> None:
    answer = client.post("/v1/retrieve", content=b'{"user_id": "ada"}', headers={"content-type": kind})
    _problem(answer, 422, "invalid-request")
    answer = client.post("/v1/retrieve", content=b'{"user_id": "ada"}', headers={"content-type": "application/a+json"})
    assert answer.status_code == 200


def test_a_failure_of_the_server_says_nothing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(ServerMetrics, "searched", fail)
    answer = client.post("/v1/retrieve", json={"user_id": "ada"})
    assert "secret" not in answer.text
    _problem(answer, 500, "internal-error")


@pytest.mark.parametrize(
    ("path", "status", "slug"),
    [
        ("/v1/items/nothing/similar", 404, "unknown-item"),
        ("/v1/items/https%3A%2F%2Fshop%2F1/similar", 404, "unknown-item"),
        ("/v1/items/i01/similar?k=0", 422, "invalid-request"),
        ("/v1/items/i01/similar?space=taste", 422, "invalid-request"),
        ("/v1/items/i01/similar?filter={", 422, "malformed-filter"),
        ("/v1/items/i01/similar?filter=[]", 422, "malformed-filter"),
        ("/v1/items/%00/similar", 422, "invalid-request"),
        ("/v1/users/nobody/interests", 404, "unknown-user"),
        ("/v1/nowhere", 404, "not-found"),
        ("/v1/retrieve", 405, "method-not-allowed"),
    ],
)
def test_get_refuses(client: TestClient, path: str, status: int, slug: str) -> None:
    _problem(client.get(path), status, slug)


@pytest.mark.parametrize(
    ("event", "status", "slug"),
    [
        ({"user_id": "ada", "item_id": "nothing"}, 422, "unknown-items"),
        ({"user_id": "ada"}, 422, "invalid-request"),
        ({"user_id": "ada", "item_id": "i01", "occurred_at": "2026-01-01T00:00:00"}, 422, "invalid-request"),
        ({"user_id": "ada", "item_id": "i01", "occurred_at": "2999-01-01T00:00:00Z"}, 422, "invalid-request"),
        ({"user_id": "ada", "item_id": "i01", "occurred_at": "1066-01-01T00:00:00Z"}, 422, "invalid-request"),
        ({"user_id": "ada", "item_id": "i01", "value": "NaN"}, 422, "invalid-request"),
        ({"user_id": "bob", "item_id": "i01", "event_id": "e1"}, 409, "event-conflict"),
    ],
)
def test_interactions_refuse_all_or_none(
    own_client: TestClient, own: str, event: dict[str, Any], status: int, slug: str
) -> None:
    first = {"user_id": "ada", "item_id": "i01", "event_id": "e1"}
    _problem(own_client.post("/v1/interactions", json={"interactions": [first, event]}), status, slug)
    with connect(own) as connection:
        assert connection.execute("select count(*) from interactions").fetchone() == (4,)


def test_body_cap(client: TestClient) -> None:
    _problem(client.post("/v1/retrieve", content=b" " * 1_000_001), 413, "body-too-large")

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    _problem(client.post("/v1/retrieve", content=chunks()), 413, "body-too-large")


def test_no_live_generation(own_client: TestClient, own: str) -> None:
    with connect(own) as connection:
        connection.execute("update generations set state = 'retired'")
    _problem(own_client.post("/v1/retrieve", json={"user_id": "ada"}), 503, "no-live-generation")
    _problem(own_client.get("/v1/items/i01/similar"), 503, "no-live-generation")
    _problem(own_client.get("/readyz"), 503, "no-live-generation")


def test_unmigrated_database(server: str) -> None:
    url = server.rsplit("/", 1)[0] + "/postgres"
    with TestClient(create_app(url), raise_server_exceptions=False) as client:
        _problem(client.get("/readyz"), 503, "not-ready")


def test_without_postgres() -> None:
    caps = Caps(deadline=3.0)
    with TestClient(
        create_app("postgresql://nobody@127.0.0.1:1/nothing", caps=caps), raise_server_exceptions=False
    ) as client:
        assert client.get("/healthz").status_code == 200
        _problem(client.get("/readyz"), 503, "no-database")
        _problem(client.post("/v1/retrieve", json={"user_id": "ada"}), 503, "no-database")


def test_postgres_gone_and_back(own_client: TestClient, own: str) -> None:
    """Every connection is cut at once: one answer fails, typed; the next one is right again."""
    assert own_client.post("/v1/retrieve", json={"user_id": "ada"}).status_code == 200
    with psycopg.connect(own, autocommit=True) as admin:
        admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()",
            [conninfo_to_dict(own)["dbname"]],
        )
    _problem(own_client.post("/v1/retrieve", json={"user_id": "ada"}), 503, "no-database")
    assert own_client.post("/v1/retrieve", json={"user_id": "ada"}).status_code == 200


def test_statement_timeout(own: str) -> None:
    """A table held by someone else: the answer is 503 by the deadline, and no connection hangs."""
    with (
        TestClient(create_app(own, caps=Caps(deadline=1.0)), raise_server_exceptions=False) as client,
        connect(own) as holder,
    ):
        holder.execute(sql.SQL("lock table generations in access exclusive mode"))
        _problem(client.post("/v1/retrieve", json={"user_id": "ada"}), 503, "deadline-exceeded")
        holder.rollback()
        assert client.post("/v1/retrieve", json={"user_id": "ada"}).status_code == 200


def _ask(limits: Limits, count: int) -> list[httpx.Response]:
    async def gather() -> list[httpx.Response]:
        transport = httpx.ASGITransport(limits)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await asyncio.gather(*(client.get("/v1/wait") for _ in range(count)))

    return asyncio.run(gather())


def _app(wait: Callable[[], Awaitable[Any]]) -> Callable[..., Awaitable[None]]:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    return app


def test_bounded_concurrency() -> None:
    """Two fit; the third is told to come back while they wait, and they still get their answers."""
    arrived = 0

    async def until_refused() -> None:
        nonlocal arrived
        arrived += 1
        while metrics.registry.get_sample_value("polytower_problems_total", {"type": "too-many-requests"}) is None:
            await asyncio.sleep(0)

    metrics = ServerMetrics()
    answers = _ask(Limits(_app(until_refused), metrics, body=100, concurrency=2, deadline=10), 3)
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    _problem(answers[2], 429, "too-many-requests")
    assert arrived == 2


def test_deadline() -> None:
    limits = Limits(_app(asyncio.Event().wait), ServerMetrics(), body=100, concurrency=2, deadline=0.05)
    _problem(_ask(limits, 1)[0], 503, "deadline-exceeded")
    assert limits.running == 0


def test_an_answer_that_has_begun_is_finished() -> None:
    """The deadline passes between the head of the response and its body: both arrive."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": b"whole"})

    (answer,) = _ask(Limits(app, ServerMetrics(), body=100, concurrency=2, deadline=0.05), 1)
    assert (answer.status_code, answer.content) == (200, b"whole")

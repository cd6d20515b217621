"""Who is slow, greedy or up to no good, and everybody else: the request's id, bodies, headers, places by client."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient

from polytower.postgres import connect
from serving.http import limits
from serving.http.connections import Connection
from serving.http.limits import Limits, address_of
from serving.metrics import ServerMetrics

BACK = {"type": "http.response.start", "status": 200, "headers": []}


async def _ok(_scope: Any, _receive: Any, send: Any) -> None:
    await send({**BACK, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def _client(app: Any, address: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def test_every_answer_has_an_id(client: TestClient) -> None:
    fine = client.post("/v1/retrieve", json={"user_id": "ada"})
    refused = client.post("/v1/retrieve", json={"user_id": "nobody"})
    assert fine.headers["x-request-id"] != refused.headers["x-request-id"]
    assert refused.json()["request_id"] == refused.headers["x-request-id"]
    assert client.get("/healthz").headers["x-request-id"]
    given = client.get("/v1/nowhere", headers={"x-request-id": "shop-7.a"})
    assert given.headers["x-request-id"] == given.json()["request_id"] == "shop-7.a"
    for insane in ("", "a b", "x" * 129, "<script>"):
        assert client.get("/healthz", headers={"x-request-id": insane}).headers["x-request-id"] != insane


@pytest.mark.parametrize("path", ["/v1/retrieve", "/v1/retrieve:batch", "/v1/interactions"])
def test_a_failure_is_in_the_log_under_its_id(
    own_client: TestClient, own: str, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """What Postgres says and nobody expects: a column is gone."""
    with connect(own) as connection:
        connection.execute("alter table interactions rename column kind to sort")
        connection.execute("alter table generations rename column dim to width")
    body = {
        "/v1/retrieve": {"user_id": "ada"},
        "/v1/retrieve:batch": {"requests": [{"user_id": "ada"}]},
        "/v1/interactions": {"interactions": [{"user_id": "ada", "item_id": "i01"}]},
    }[path]
    with caplog.at_level(logging.ERROR):
        answer = own_client.post(path, json=body)
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/internal-error")
    (record,) = [record for record in caplog.records if record.name == "serving.http.respond"]
    assert answer.json()["request_id"] in record.getMessage()
    assert record.exc_info is not None
    assert "does not exist" in str(record.exc_info[1])
    assert "does not exist" not in answer.text


def test_endless_bodies_take_no_place() -> None:
    """One client's bodies never end: he is told so, and meanwhile others are answered."""
    never = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await never.wait()

    async def ask() -> tuple[list[httpx.Response], list[httpx.Response], int]:
        bounded = Limits(_ok, ServerMetrics(), body=100, concurrency=2, deadline=20, per_client=2, reading=1)
        async with _client(bounded, "1.1.1.1") as greedy, _client(bounded, "2.2.2.2") as other:
            sending = [asyncio.create_task(greedy.post("/v1/x", content=endless())) for _ in range(8)]
            while bounded.arriving < 2:
                await asyncio.sleep(0)
            answers = [await other.post("/v1/x", content=b"{}") for _ in range(3)]
            assert not all(task.done() for task in sending)
            return answers, await asyncio.gather(*sending), bounded.arriving + bounded.running + len(bounded.clients)

    answers, endless_ones, left = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200] * 3
    assert sorted(answer.status_code for answer in endless_ones) == [408] * 2 + [429] * 6
    assert {answer.headers.get("connection") for answer in endless_ones} == {"close", None}
    assert left == 0


def test_a_key_that_cannot_be_looked_up_takes_no_place_and_has_a_deadline() -> None:
    async def never(_scope: Any) -> str | None:
        await asyncio.Event().wait()
        return None

    async def ask() -> tuple[list[httpx.Response], int]:
        bounded = Limits(_ok, ServerMetrics(), body=100, concurrency=1, deadline=0.5, admit=never)
        async with _client(bounded, "1.1.1.1") as client:
            asking = [asyncio.create_task(client.get("/v1/x")) for _ in range(limits.ARRIVING + 2)]
            while sum(task.done() for task in asking) < 2:
                await asyncio.sleep(0)
            assert bounded.running == 0
            return await asyncio.gather(*asking), bounded.arriving

    answers, left = asyncio.run(ask())
    slugs = sorted(answer.json()["type"] for answer in answers)
    assert slugs == ["/problems/deadline-exceeded"] * limits.ARRIVING + ["/problems/too-many-requests"] * 2
    assert left == 0


def test_one_client_cannot_take_all_places() -> None:
    """Two clients behind one address are one, unless their keys tell them apart."""
    gate = asyncio.Event()

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await gate.wait()
        await _ok(scope, receive, send)

    async def admit(scope: Any) -> str | None:
        return dict(scope["headers"]).get(b"key", b"").decode() or None

    async def ask() -> list[list[int]]:
        bounded = Limits(wait, ServerMetrics(), body=100, concurrency=4, deadline=20, per_client=3, admit=admit)
        async with _client(bounded, "1.1.1.1") as one, _client(bounded, "2.2.2.2") as two:
            asking = [asyncio.create_task(one.get("/v1/x")) for _ in range(5)]
            while sum(task.done() for task in asking) < 2:
                await asyncio.sleep(0)
            further = [asyncio.create_task(c.get("/v1/x", headers=h)) for c, h in ((two, {}), (one, {"key": "k"}))]
            while not any(task.done() for task in further):
                await asyncio.sleep(0)
            gate.set()
            return [[(await task).status_code for task in tasks] for tasks in (asking, further)]

    asking, further = asyncio.run(ask())
    assert sorted(asking) == [200, 200, 200, 429, 429]
    assert sorted(further) == [200, 429]  # the fourth place, and none left


def test_an_answer_that_nobody_takes_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SENDING", 0.05)

    async def ask() -> int:
        bounded = Limits(_ok, ServerMetrics(), body=100, concurrency=1, deadline=20)

        async def stuck(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async def receive() -> Any:
            return {"type": "http.request"}

        await bounded({"type": "http", "path": "/v1/x", "headers": [], "client": None}, receive, stuck)
        return bounded.running

    assert asyncio.run(ask()) == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::1", True),
        ("testclient", "testclient", True),
    ],
)
def test_clients_by_address(one: str, other: str, same: bool) -> None:
    assert (address_of({"client": (one, 1)}) == address_of({"client": (other, 1)})) is same
    assert address_of({"client": None}) == ""


@contextmanager
def _served(kind: type[Connection]) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(_ok, port=0, log_level="critical", http=kind, ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


class Impatient(Connection):
    PATIENCE, HEADERS, OPEN = 0.3, 2000, 3


def _closed(opened: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    opened.settimeout(30)
    received = b""
    try:
        while chunk := opened.recv(4096):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def test_headers_that_never_end() -> None:
    with _served(Impatient) as port:
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-One: ")
            assert _closed(slow) == b""
        with socket.create_connection(("127.0.0.1", port)) as large:
            large.sendall(b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 1000)
            assert _closed(large) == b""
        with socket.create_connection(("127.0.0.1", port)) as second:  # on a connection that was of use before
            second.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost")
            assert _closed(second).startswith(b"HTTP/1.1 200")


def test_a_body_that_goes_on_after_the_answer() -> None:
    with _served(Impatient) as port, socket.create_connection(("127.0.0.1", port)) as endless:
        endless.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        assert endless.recv(12) == b"HTTP/1.1 200"
        assert _sends_for_ever(endless) is False


def _sends_for_ever(opened: socket.socket) -> bool:
    """False once the server has closed the connection."""
    try:
        while True:
            opened.sendall(b"1\r\nx\r\n")
    except OSError:
        return False


def test_one_address_cannot_take_all_connections() -> None:
    with _served(Impatient) as port:
        opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        assert _closed(opened[3]) == b""
        for each in opened:
            each.close()
        while not _answers(port):
            pass


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    except httpx.TransportError:
        return False

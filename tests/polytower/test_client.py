"""The client against a real server: typed answers, typed errors, retries, one connection for many questions."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polytower import client as api
from polytower.client import (
    BusyError,
    Client,
    ClientError,
    Interaction,
    InvalidError,
    NotAllowedError,
    NotFoundError,
    ProblemError,
    Question,
)
from polytower.postgres import connect
from serving import models
from serving.http import keys
from tests.conftest import cloned
from tests.generation_factory import Synthetic, unit, write_generation
from tests.serving.conftest import listening

DOCS = Path(__file__).parents[2] / "docs" / "client.md"


@pytest.fixture(scope="module")
def data() -> Synthetic:
    random = np.random.default_rng(1)
    return Synthetic(
        [str(n) for n in range(60)],
        unit(random.standard_normal((60, 8))),
        {"196": unit(random.standard_normal((3, 8)))},
        attributes=[{"genres": ["Comedy" if n % 2 else "Drama"]} for n in range(60)],
        seen={"196": ["1", "2"]},
    )


@pytest.fixture(scope="module")
def server_and_key(server: str, data: Synthetic) -> Iterator[tuple[str, str]]:
    with cloned(server, "test_client") as url:
        with connect(url) as connection:
            write_generation(connection, data)
            _, key = keys.create(connection, "client", ["read", "write"], rate=None, burst=1)
        with listening(url, "--require-keys") as address:
            yield address, key


@pytest.fixture
def client(server_and_key: tuple[str, str]) -> Iterator[Client]:
    address, key = server_and_key
    with Client(address, key=key, timeout=60) as opened:
        yield opened


def test_questions(client: Client, data: Synthetic) -> None:
    assert client.ready() == 1
    assert client.generations()[0]["dim"] == 8
    stored = client.retrieve(user_id="196", k=5, titles=True, filter={"genres": "Comedy"})
    assert (stored.generation, stored.interests, stored.degraded, len(stored.candidates)) == (1, "stored", None, 5)
    assert stored.candidates[0].title == f"Title {stored.candidates[0].item_id}"
    given = client.retrieve(
        Question(vectors=data.interests["196"].astype(np.float16), k=5, exclude=("1", "2"), filter={"genres": "Comedy"})
    )
    assert [(c.item_id, c.score) for c in given.candidates] == [(c.item_id, c.score) for c in stored.candidates]
    interests = client.interests("196")
    np.testing.assert_allclose(np.stack([i.embedding for i in interests]), data.interests["196"], atol=1e-3)
    assert interests[0].as_of.tzinfo is not None
    assert [n.rank for n in client.similar("50", k=3, space="content")] == [1, 2, 3]
    answers = client.retrieve_batch([Question(user_id="196", k=2), Question(user_id="nobody")])
    assert isinstance(answers[0], api.Answer)
    assert isinstance(answers[1], ProblemError)
    assert answers[1].slug == "unknown-user"
    table = client.retrieve_table(user_id="196", k=4, similarity=True)
    assert (table.num_rows, "interest_max" in table.column_names) == (4, True)
    assert client.features(None, similarity=True, user_id=["196"], item_id=["50"]).num_rows == 1


def test_events_count_once(client: Client) -> None:
    event = Interaction(user_id="new", item_id="5", event_id="e", occurred_at=datetime(2026, 1, 1, tzinfo=UTC))
    assert client.interact([event]) == (1, 0)
    assert client.interact([event]) == (0, 1)


@pytest.mark.parametrize(
    ("path", "kind", "slug"),
    [
        ({"user_id": "nobody"}, NotFoundError, "unknown-user"),
        ({"user_id": "196", "k": 0}, InvalidError, "invalid-request"),
        ({"vectors": [[1.0, 2.0]]}, InvalidError, "wrong-dimension"),
        ({"text": "anything"}, InvalidError, "no-such-content"),
    ],
)
def test_problems_are_typed(client: Client, path: dict[str, Any], kind: type[ProblemError], slug: str) -> None:
    with pytest.raises(kind) as raised:
        client.retrieve(**path)
    assert raised.value.slug == slug
    assert raised.value.problem["detail"] in str(raised.value)


def test_without_a_key(server_and_key: tuple[str, str]) -> None:
    with Client(server_and_key[0]) as client, pytest.raises(NotAllowedError) as raised:
        client.retrieve(user_id="196")
    assert raised.value.status == 401


def test_ids_are_quoted(client: Client) -> None:
    with pytest.raises(NotFoundError) as raised:
        client.similar("a/b?c=d#e ü")
    assert raised.value.slug == "unknown-item"


def test_threads_share_a_client(client: Client) -> None:
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda n: client.retrieve(user_id="196", k=1 + n % 3), range(12)))
    assert [len(answer.candidates) for answer in answers] == [1 + n % 3 for n in range(12)]
    assert len(client._transport._idle) <= 4


def test_dataclasses_are_those_of_the_server() -> None:
    pairs = [
        (api.Candidate, models.CandidateModel, set()),
        (api.Answer, models.RetrieveAnswer, set()),
        (api.Interest, models.InterestModel, set()),
        (api.Neighbour, models.NeighbourModel, {"title"}),
        (api.Interaction, models.InteractionModel, set()),
        # `titles` stands for fields=["title"]
        (api.Question, models.RetrieveRequest, {"fields"}),
    ]
    for mine, theirs, left_out in pairs:
        known = {each.name for each in fields(mine)} - {"titles"}
        assert set(theirs.model_fields) - left_out <= known, mine


def test_the_documented_example(server_and_key: tuple[str, str]) -> None:
    address, key = server_and_key
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    ran = example.replace('"http://127.0.0.1:8000"', repr(address)).replace('"ptk_…"', repr(key))
    assert ran.count(address) == 1
    assert ran.count(key) == 1
    exec(compile(ran, str(DOCS), "exec"), {})


@contextmanager
def scripted(*replies: tuple[int, dict[str, str], bytes] | None) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these replies, one a request (None: it hangs up); yields its URL and what it was asked."""
    asked: list[str] = []
    left = list(replies)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            asked.append(self.path)
            reply = left.pop(0)
            if reply is None:
                self.close_connection = True
                return
            status, headers, body = reply
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST  # noqa: N815 the names that http.server calls

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


PROBLEM = {"Content-Type": "application/problem+json"}
BUSY = (429, {**PROBLEM, "Retry-After": "7"}, b'{"type": "/problems/rate-limited", "title": "t", "detail": "d"}')
GONE = (503, {**PROBLEM, "Retry-After": "300"}, b'{"type": "/problems/no-database", "title": "t", "detail": "d"}')
READY = (200, {"Content-Type": "application/json"}, b'{"status": "ready", "generation": 4}')
TAKEN = (200, {"Content-Type": "application/json"}, b'{"accepted": 1, "duplicates": 0}')


def _client(url: str, **options: Any) -> tuple[Client, list[float]]:
    """A client that notes its pauses instead of making them."""
    client, pauses = Client(url, timeout=5, **options), list[float]()
    client._transport.sleep = pauses.append
    return client, pauses


def test_retries_honour_retry_after() -> None:
    with scripted(None, BUSY, GONE, READY) as (url, asked):
        client, pauses = _client(url, wait=20)
        assert client.ready() == 4
        client.close()
    assert len(asked) == 4
    assert pauses[0] < 1
    assert 7 <= pauses[1] <= 7.7
    assert 20 <= pauses[2] <= 22  # 300 are more than it waits


def test_a_kept_connection_that_was_closed_is_replaced_at_once() -> None:
    with scripted(READY, None, READY) as (url, asked):
        client, pauses = _client(url)
        assert [client.ready(), client.ready()] == [4, 4]
        client.close()
    assert (len(asked), pauses) == (3, [])


def test_retries_end() -> None:
    with scripted(*[BUSY] * 3) as (url, asked):
        client, _ = _client(url, retries=2)
        with pytest.raises(BusyError) as raised:
            client.ready()
        client.close()
    assert (raised.value.slug, len(asked)) == ("rate-limited", 3)


def test_events_without_an_id_are_not_sent_twice() -> None:
    event = Interaction(user_id="u", item_id="i")
    for reply, kind in ((None, ClientError), (GONE, BusyError)):
        with scripted(reply, TAKEN) as (url, asked):
            client, _ = _client(url)
            with pytest.raises(kind):
                client.interact([event])
            client.close()
        assert len(asked) == 1
    with scripted(READY, None, TAKEN) as (url, asked):
        client, _ = _client(url)
        client.ready()  # leaves a connection, which the event must not trust
        with pytest.raises(ClientError):
            client.interact([event])
        client.close()
    with scripted(None, TAKEN) as (url, asked):
        client, _ = _client(url)
        assert client.interact([Interaction(user_id="u", item_id="i", event_id="e")]) == (1, 0)
        client.close()
    assert len(asked) == 2


def test_what_is_no_server_of_ours() -> None:
    with scripted((500, {"Content-Type": "text/html"}, b"<h1>proxy</h1>")) as (url, _):
        client, _ = _client(url)
        with pytest.raises(ClientError, match="HTTP 500"):
            client.ready()
        client.close()
    client, pauses = _client("http://127.0.0.1:1", retries=1)
    with pytest.raises(ClientError, match="no answer"):
        client.ready()
    assert len(pauses) == 1
    with pytest.raises(ClientError, match="is not a server address"):
        Client("127.0.0.1:8000")

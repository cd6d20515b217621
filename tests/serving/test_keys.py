"""API keys: who is let in, for what, how often; what is kept of a key; how soon a revoked one is refused."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from polytower.cli import cli
from polytower.commands.serve import _guarded
from polytower.errors import UserError
from polytower.postgres import connect
from serving.database import Database
from serving.errors import Problem
from serving.http import guard, keys
from serving.http.app import create_app
from serving.http.guard import KeyRing, TokenBucket
from serving.http.keys import Scope
from serving.metrics import ServerMetrics
from tests.conftest import as_server

ASK = {"user_id": "ada", "k": 3}
EVENT = {"interactions": [{"user_id": "ada", "item_id": "i20", "event_id": "e1"}]}


@pytest.fixture
def guarded(own: str) -> Iterator[TestClient]:
    """A client of a server that requires keys."""
    with TestClient(create_app(as_server(own), require_keys=True), raise_server_exceptions=False) as client:
        yield client


def _key(url: str, *scopes: Scope, rate: float | None = None, burst: int = 1) -> dict[str, str]:
    with connect(url) as connection:
        _, key = keys.create(connection, "test", scopes, rate=rate, burst=burst)
    return {"Authorization": f"Bearer {key}"}


def _refused(response: httpx.Response, status: int, slug: str) -> httpx.Response:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == f"/problems/{slug}"
    assert ("www-authenticate" in response.headers) == (status == 401)
    return response


def test_only_a_valid_key_is_let_in(guarded: TestClient, own: str) -> None:
    reader = _key(own, "read")
    assert guarded.post("/v1/retrieve", json=ASK, headers=reader).status_code == 200
    _refused(guarded.post("/v1/retrieve", json=ASK), 401, "missing-key")
    _refused(guarded.get("/v1/nowhere"), 401, "missing-key")
    for authorization in ("Bearer nonsense", f"Bearer {reader['Authorization'][7:-1]}", "Bearer \xff"):
        encoded = {"Authorization": authorization.encode("latin-1")}
        _refused(guarded.post("/v1/retrieve", json=ASK, headers=encoded), 401, "unknown-key")
    for authorization in ("", "Bearer", "Bearer  ", reader["Authorization"][7:], "Basic YTpi"):
        headers = {"Authorization": authorization}
        _refused(guarded.post("/v1/retrieve", json=ASK, headers=headers), 401, "missing-key")


def test_probes_and_the_documentation_are_open(guarded: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert guarded.get(path).status_code == 200, path
    document = guarded.get("/openapi.json").json()
    assert document["paths"]["/v1/interactions"]["post"]["security"] == [{"key": ["write"]}]
    assert {"401", "403"} <= document["paths"]["/v1/retrieve"]["post"]["responses"].keys()
    assert "security" not in document["paths"]["/healthz"]["get"]


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        (["read"], {"read"}),
        (["write"], {"write"}),
        (["read", "write"], {"read", "write"}),
        (["admin"], {"read", "write", "admin"}),
    ],
)
def test_scopes(guarded: TestClient, own: str, scopes: list[Scope], allowed: set[Scope]) -> None:
    headers = _key(own, *scopes)
    answers = {
        "read": guarded.get("/v1/generations", headers=headers),
        "write": guarded.post("/v1/interactions", json=EVENT, headers=headers),
        "admin": guarded.get("/metrics", headers=headers),
    }
    assert {scope for scope, answer in answers.items() if answer.status_code == 200} == allowed
    for scope in answers.keys() - allowed:
        _refused(answers[scope], 403, "insufficient-scope")


def test_a_key_that_asks_too_often_is_told_when_to_come_back(guarded: TestClient, own: str) -> None:
    headers = _key(own, "read", rate=0.01, burst=2)
    other = _key(own, "read", rate=0.01, burst=2)
    assert [guarded.get("/v1/generations", headers=headers).status_code for _ in range(3)] == [200, 200, 429]
    refused = _refused(guarded.get("/v1/generations", headers=headers), 429, "rate-limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 100
    assert guarded.get("/v1/generations", headers=other).status_code == 200


def test_a_batch_counts_as_its_questions(guarded: TestClient, own: str) -> None:
    headers = _key(own, "read", rate=0.01, burst=3)
    answer = guarded.post("/v1/retrieve:batch", json={"requests": [ASK] * 3}, headers=headers)
    assert answer.status_code == 200
    _refused(guarded.get("/v1/generations", headers=headers), 429, "rate-limited")


def test_only_hashes_are_kept_and_analysts_do_not_see_them(own: str) -> None:
    with connect(own) as connection:
        record, key = keys.create(connection, "one", ["read"], rate=None, burst=1)
        row = connection.execute("select api_keys::text, hash from api_keys").fetchone()
        assert row is not None
        assert key not in row[0]
        assert key.rsplit("_", 1)[-1] not in row[0]
        assert row[1] == keys.fingerprint(key)
        assert len(key) > 50
        grant = connection.execute(
            "select has_table_privilege('polytower_reader', 'api_keys', 'select'),"
            " has_table_privilege('polytower_reader', 'items', 'select')"
        ).fetchone()
    assert grant == (False, True)
    assert record.key_id in key


def test_a_revoked_key_is_refused_within_seconds(own: str) -> None:
    """Time is the test's own: what was read is believed for FRESH seconds and not longer."""
    now = 100.0

    async def ask() -> list[str]:
        nonlocal now
        database = Database(own, ServerMetrics(), size=1, timeout=5)
        await database.open()
        ring = KeyRing(database, clock=lambda: now)
        answers = []
        try:
            for seconds in (0.0, guard.FRESH / 2, guard.FRESH):
                now += seconds
                try:
                    await ring.admit(key, "read")
                    answers.append("in")
                except Problem as problem:
                    answers.append(problem.kind.slug)
                with connect(own) as connection:
                    keys.revoke(connection, record.key_id)
        finally:
            await database.close()
        return answers

    with connect(own) as connection:
        record, key = keys.create(connection, "one", ["read"], rate=None, burst=1)
    assert asyncio.run(ask()) == ["in", "in", "unknown-key"]


def test_the_last_use_is_noted(own: str) -> None:
    with connect(own) as connection:
        record, key = keys.create(connection, "one", ["read"], rate=None, burst=1)
        unused, _ = keys.create(connection, "two", ["read"], rate=None, burst=1)
    with TestClient(create_app(as_server(own), require_keys=True)) as client:
        assert client.get("/v1/generations", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    with connect(own) as connection:
        used = {found.key_id: found.last_used_at for found in keys.listing(connection)}
    assert used[record.key_id] is not None
    assert used[unused.key_id] is None


def test_without_postgres_a_guarded_server_says_so() -> None:
    with TestClient(
        create_app("postgresql://nobody@127.0.0.1:1/nothing", require_keys=True), raise_server_exceptions=False
    ) as client:
        client.app.state.services.database._timeout = 0.5  # type: ignore[attr-defined]
        answer = client.get("/v1/generations", headers={"Authorization": "Bearer x"})
    _refused(answer, 503, "no-database")


@given(
    rate=st.floats(0.1, 1000),
    burst=st.integers(1, 50),
    gaps=st.lists(st.floats(0, 2), min_size=1, max_size=60),
)
def test_a_bucket_never_gives_more_than_its_rate_allows(rate: float, burst: int, gaps: list[float]) -> None:
    bucket = TokenBucket(rate, burst, burst, 0.0)
    now, given_out = 0.0, 0
    for gap in gaps:
        now += gap
        wait = bucket.spend(now)
        if wait == 0:
            given_out += 1
        else:
            assert TokenBucket(rate, burst, bucket.tokens, now).spend(now + wait * (1 + 1e-9)) == 0
    assert given_out <= burst + rate * now + 1e-6


@pytest.mark.parametrize(
    ("host", "wanted", "outcome"),
    [
        ("127.0.0.1", None, False),
        ("localhost", None, False),
        ("::1", None, False),
        ("127.0.0.1", True, True),
        ("0.0.0.0", True, True),
        ("0.0.0.0", False, False),
        ("0.0.0.0", None, UserError),
        ("::", None, UserError),
        ("192.168.1.5", None, UserError),
        ("my-host", None, UserError),
        ("", None, UserError),
    ],
)
def test_who_may_bind_what(host: str, wanted: bool | None, outcome: Any) -> None:
    if outcome is UserError:
        with pytest.raises(UserError, match="--require-keys"):
            _guarded(host, wanted)
    else:
        assert _guarded(host, wanted) is outcome


def test_command_line(platform: str) -> None:
    def run(*arguments: str) -> Any:
        done = CliRunner().invoke(cli, ["keys", *arguments, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.splitlines()[-1])

    assert run("list") == []
    made = run("create", "shop", "--scope", "read", "--scope", "write", "--rate", "5")
    assert (made["scopes"], made["rate"], made["burst"]) == (["read", "write"], 5.0, 10)
    (listed,) = run("list")
    assert {**listed, "key": made["key"]} == made
    assert run("revoke", made["key_id"]) == {"revoked": made["key_id"], "changed": True}
    assert run("revoke", made["key_id"]) == {"revoked": made["key_id"], "changed": False}
    assert run("list")[0]["revoked_at"] is not None
    with pytest.raises(UserError, match="polytower keys list"):
        CliRunner().invoke(cli, ["keys", "revoke", "none"], catch_exceptions=False)


def test_the_setting(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_REQUIRE_KEYS", "yes")
    with TestClient(create_app(own)) as client:
        assert client.get("/v1/generations").status_code == 401
    monkeypatch.setenv("POLYTOWER_REQUIRE_KEYS", "ture")
    with pytest.raises(UserError, match="must be 1 or 0"):
        create_app(own)


def _ring(url: str) -> tuple[Database, KeyRing]:
    database = Database(url, ServerMetrics(), size=2, timeout=5)
    return database, KeyRing(database)


def test_without_postgres_the_keys_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty requests at once wait for one reading; who comes just after it failed is told at once."""
    monkeypatch.setattr(guard, "PATIENCE", 0.5)

    async def ask() -> tuple[list[Any], int]:
        database, ring = _ring("postgresql://nobody@127.0.0.1:1/nothing")
        tried = 0
        connection = database.connection

        def counted(timeout: float | None = None) -> Any:
            nonlocal tried
            tried += 1
            return connection(timeout)

        monkeypatch.setattr(database, "connection", counted)
        await database.open()
        try:
            many = [ring.admit(f"key {n}", "read", f"10.0.0.{n}") for n in range(30)]
            answers = await asyncio.gather(*many, return_exceptions=True)
            answers += await asyncio.gather(ring.admit("another", "read", "10.0.1.1"), return_exceptions=True)
        finally:
            await database.close()
        return answers, tried

    answers, tried = asyncio.run(ask())
    assert {answer.kind.slug for answer in answers} == {"no-database"}
    assert tried == 1


def test_unknown_keys_are_throttled_by_address(guarded: TestClient, own: str) -> None:
    """A guesser is told to wait, with no question to Postgres; a valid key from his address is let in."""
    reader = _key(own, "read")
    guesses = [guarded.get("/v1/generations", headers={"Authorization": f"Bearer {n}"}) for n in range(guard.TRIES + 5)]
    assert [answer.status_code for answer in guesses[: guard.TRIES]] == [401] * guard.TRIES
    assert 429 in [answer.status_code for answer in guesses[guard.TRIES :]]
    refused = next(answer for answer in guesses if answer.status_code == 429)
    _refused(refused, 429, "rate-limited")
    assert guarded.get("/v1/generations", headers=reader).status_code == 200


def test_strangers_of_other_addresses_are_not_held_up(own: str) -> None:
    async def ask() -> list[str]:
        database, ring = _ring(own)
        await database.open()
        slugs = []
        try:
            for address in ["1.1.1.1"] * (guard.TRIES + 1) + ["2.2.2.2"]:
                with pytest.raises(Problem) as refusal:
                    await ring.admit("unknown", "read", address)
                slugs.append(refusal.value.kind.slug)
        finally:
            await database.close()
        return slugs

    assert asyncio.run(ask())[-2:] == ["rate-limited", "unknown-key"]

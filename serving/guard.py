"""Who asks, and may they: API keys and their rate limits, before anything of a body is read. Plain ASGI.

All active keys are held in memory and read again every two seconds at most: a made-up key costs Postgres nothing, and
a revoked one is refused within that time.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic

import psycopg
from psycopg.rows import tuple_row
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import keys
from serving.database import Database
from serving.errors import NO_KEY, NO_SCOPE, RATE_LIMITED, UNKNOWN_KEY, Problem, from_postgres
from serving.keys import ApiKey
from serving.limits import send_problem
from serving.metrics import Metrics

FRESH = 2.0  # seconds that the keys in memory are believed
NOTED = 60.0  # seconds between two notes of when a key was last used


def scope_of(path: str) -> keys.Scope | None:
    """The scope that a path needs; None where everybody may ask (probes, documentation)."""
    if path == "/v1/interactions":
        return "write"
    if path == "/metrics":
        return "admin"
    return "read" if path.startswith("/v1/") else None


@dataclass
class TokenBucket:
    """burst requests at once, rate per second in the long run. tokens may be negative: a batch is paid afterwards."""

    rate: float
    burst: int
    tokens: float
    at: float

    def take(self, now: float) -> float:
        """Takes one token and answers 0, or answers the seconds until there is one."""
        self.tokens = min(self.burst, self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens < 1:
            return (1 - self.tokens) / self.rate
        self.tokens -= 1
        return 0.0


class KeyRing:
    """The active keys, their buckets and when they were used; one per server."""

    def __init__(self, database: Database, clock: Callable[[], float] = monotonic) -> None:
        self._database = database
        self._clock = clock
        self._keys: dict[bytes, ApiKey] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self._used: dict[str, datetime] = {}
        self._read_at = self._noted_at = -math.inf
        self._reading = asyncio.Lock()

    async def admit(self, presented: str | None, scope: keys.Scope) -> ApiKey:
        """The key behind what a request presented. Raises Problem: none, unknown or revoked, no scope, too often."""
        if presented is None:
            raise Problem(NO_KEY, "send a key as `Authorization: Bearer KEY`; `polytower keys create` makes one")
        await self._refresh()
        key = self._keys.get(keys.fingerprint(presented))
        if key is None:
            raise Problem(UNKNOWN_KEY, "the key is unknown or revoked")
        if not key.allows(scope):
            raise Problem(NO_SCOPE, f"key {key.key_id} has the scopes {', '.join(key.scopes)}; this needs {scope}")
        self._spend(key)
        self._used[key.key_id] = datetime.now(UTC)
        return key

    def charge(self, key: ApiKey, requests: int) -> None:
        """Counts further requests against a key that was admitted; it waits for them the next time."""
        bucket = self._buckets.get(key.key_id)
        if bucket is not None:
            bucket.tokens -= requests

    async def note_use(self) -> None:
        """Writes when keys were last used, for all at once."""
        used, self._used = self._used, {}
        if used:
            async with self._database.connection(timeout=2) as connection:
                await connection.execute(keys.NOTE_USE, {"key_ids": list(used), "times": list(used.values())})

    def _spend(self, key: ApiKey) -> None:
        if key.rate is None:
            return
        now = self._clock()
        bucket = self._buckets.get(key.key_id)
        if bucket is None or (bucket.rate, bucket.burst) != (key.rate, key.burst):
            bucket = self._buckets[key.key_id] = TokenBucket(key.rate, key.burst, key.burst, now)
        wait = bucket.take(now)
        if wait:
            detail = f"key {key.key_id} may ask {key.rate:g} times a second, {key.burst} at once"
            raise Problem(RATE_LIMITED, detail, retry_after=math.ceil(wait))

    async def _refresh(self) -> None:
        if self._clock() - self._read_at < FRESH:
            return
        async with self._reading:
            if self._clock() - self._read_at < FRESH:  # another request has just read them
                return
            began = self._clock()
            async with (
                self._database.connection() as connection,
                connection.cursor(row_factory=tuple_row) as cursor,
            ):
                rows = await (await cursor.execute(keys.ACTIVE)).fetchall()
            self._keys = {bytes(fingerprint): ApiKey(*record) for fingerprint, *record in rows}
            known = {key.key_id for key in self._keys.values()}
            self._buckets = {key_id: bucket for key_id, bucket in self._buckets.items() if key_id in known}
            self._read_at = began
            if began - self._noted_at >= NOTED:
                self._noted_at = began
                await self.note_use()


class Guard:
    """Wraps the application: a request without a fitting key gets a problem response and goes no further.

    The key of an admitted request is in scope["state"]["key"].
    """

    def __init__(self, app: ASGIApp, ring: KeyRing, metrics: Metrics) -> None:
        self.app = app
        self.ring = ring
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Probes and the documentation are open."""
        needed = scope_of(scope["path"]) if scope["type"] == "http" else None
        if needed is not None:
            try:
                with self.metrics.stage("key"):
                    key = await self.ring.admit(_presented(scope), needed)
            except Problem as problem:
                await send_problem(send, problem, self.metrics)
                return
            except psycopg.Error as error:
                await send_problem(send, from_postgres(error), self.metrics)
                return
            scope.setdefault("state", {})["key"] = key
        await self.app(scope, receive, send)


def _presented(scope: Scope) -> str | None:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None

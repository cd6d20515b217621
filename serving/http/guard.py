"""Who asks, and may they: API keys and their rate limits, before anything of a body is read.

All active keys are held in memory and read again every two seconds at most: a made-up key costs Postgres nothing, and
a revoked one is refused within that time. serving/http/limits.py asks here, within a request's deadline.
"""

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from time import monotonic

import psycopg
from psycopg.rows import tuple_row
from starlette.datastructures import Headers
from starlette.types import Scope

from serving.database import Database
from serving.errors import NO_DATABASE, NO_KEY, NO_SCOPE, RATE_LIMITED, UNKNOWN_KEY, Problem
from serving.http import keys
from serving.http.keys import ApiKey
from serving.http.limits import address_of
from serving.metrics import ServerMetrics

LOG = logging.getLogger(__name__)
FRESH = 2.0  # seconds that the keys in memory are believed
PATIENCE = 2.0  # seconds that reading them may take
FAILED = 1.0  # seconds before it is tried again
TRIES = 20  # unknown keys from one address at once; one a second in the long run
ADDRESSES = 10_000  # whose unknown keys are counted
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

    def spend(self, now: float) -> float:
        """Takes one token and answers 0, or answers the seconds until there is one."""
        self.tokens = min(self.burst, self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens < 1:
            return (1 - self.tokens) / self.rate
        self.tokens -= 1
        return 0.0


class Strangers:
    """Throttles keys that nobody knows, by the address that they come from. Only the newest addresses are held."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def count_try(self, address: str, now: float) -> None:
        """Counts one try. Raises Problem beyond TRIES at once and one a second."""
        bucket = self._buckets.setdefault(address, TokenBucket(1.0, TRIES, TRIES, now))
        self._buckets.move_to_end(address)
        while len(self._buckets) > ADDRESSES:
            self._buckets.popitem(last=False)
        wait = bucket.spend(now)
        if wait:
            detail = "too many keys from this address were unknown or revoked; a valid one is still let in"
            raise Problem(RATE_LIMITED, detail, retry_after=math.ceil(wait))

    def give_back(self, address: str) -> None:
        """The try was a valid key."""
        if address in self._buckets:
            self._buckets[address].tokens += 1


class KeyRing:
    """The active keys, their buckets and when they were used; one per server."""

    def __init__(self, database: Database, clock: Callable[[], float] = monotonic) -> None:
        self._database = database
        self._clock = clock
        self._keys: dict[bytes, ApiKey] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self._strangers = Strangers()
        self._used: dict[str, datetime] = {}
        self._read_at = self._noted_at = self._failed_at = -math.inf
        self._reading: asyncio.Task[None] | None = None

    async def admit(self, presented: str | None, scope: keys.Scope, address: str = "") -> ApiKey:
        """The key behind what a request presented. Raises Problem: none, unknown or revoked, no scope, too often."""
        if presented is None:
            raise Problem(NO_KEY, "send a key as `Authorization: Bearer KEY`; `polytower keys create` makes one")
        fingerprint = keys.fingerprint(presented)
        stranger = fingerprint not in self._keys
        self._read_if_stale()
        if stranger:  # before it waits for anything
            self._strangers.count_try(address, self._clock())
        await self._fresh()
        key = self._keys.get(fingerprint)
        if key is None:
            raise Problem(UNKNOWN_KEY, "the key is unknown or revoked")
        if stranger:
            self._strangers.give_back(address)
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
        """Writes when keys were last used, for all at once. What cannot be written now is lost, and nothing else."""
        used, self._used = self._used, {}
        if not used:
            return
        try:
            async with self._database.connection(timeout=PATIENCE) as connection:
                await connection.execute(keys.NOTE_USE, {"key_ids": list(used), "times": list(used.values())})
        except (psycopg.Error, Problem) as error:
            LOG.warning("when API keys were last used could not be written: %s", error)

    def _spend(self, key: ApiKey) -> None:
        if key.rate is None:
            return
        now = self._clock()
        bucket = self._buckets.get(key.key_id)
        if bucket is None or (bucket.rate, bucket.burst) != (key.rate, key.burst):
            bucket = self._buckets[key.key_id] = TokenBucket(key.rate, key.burst, key.burst, now)
        wait = bucket.spend(now)
        if wait:
            detail = f"key {key.key_id} may ask {key.rate:g} times a second, {key.burst} at once"
            raise Problem(RATE_LIMITED, detail, retry_after=math.ceil(wait))

    @property
    def _stale(self) -> bool:
        return self._clock() - self._read_at >= FRESH

    def _read_if_stale(self) -> None:
        """One reading for all who wait; one that failed is not repeated at once."""
        if self._stale and self._reading is None and self._clock() - self._failed_at >= FAILED:
            self._reading = asyncio.get_running_loop().create_task(self._read())
            self._reading.add_done_callback(self._has_read)

    async def _fresh(self) -> None:
        """Waits until what is in memory is fresh. Raises Problem, psycopg.Error."""
        if not self._stale:
            return
        if self._reading is None:
            raise Problem(NO_DATABASE, "the keys cannot be read: the database does not answer; try again")
        await asyncio.shield(self._reading)

    def _has_read(self, reading: asyncio.Task[None]) -> None:
        self._reading = None
        if reading.cancelled() or reading.exception():
            self._failed_at = self._clock()

    async def _read(self) -> None:
        began = self._clock()
        try:
            async with (
                asyncio.timeout(PATIENCE),
                self._database.connection(timeout=PATIENCE) as connection,
                connection.cursor(row_factory=tuple_row) as cursor,
            ):
                rows = await (await cursor.execute(keys.ACTIVE)).fetchall()
        except TimeoutError as error:
            raise Problem(NO_DATABASE, "the keys could not be read in time; try again") from error
        self._keys = {bytes(fingerprint): ApiKey(*record) for fingerprint, *record in rows}
        known = {key.key_id for key in self._keys.values()}
        self._buckets = {key_id: bucket for key_id, bucket in self._buckets.items() if key_id in known}
        self._read_at = began
        if began - self._noted_at >= NOTED:
            self._noted_at = began
            await self.note_use()


class Guard:
    """Says of each request which key it brings; scope["state"]["charge"] then counts further requests against it."""

    def __init__(self, ring: KeyRing, metrics: ServerMetrics) -> None:
        self.ring = ring
        self.metrics = metrics

    async def admit(self, scope: Scope) -> str | None:
        """The key's id; None where everybody may ask. Raises Problem without a fitting key."""
        needed = scope_of(scope["path"])
        if needed is None:
            return None
        with self.metrics.stage("key"):
            key = await self.ring.admit(_presented(scope), needed, address_of(scope))
        scope.setdefault("state", {})["charge"] = partial(self.ring.charge, key)
        return key.key_id


def _presented(scope: Scope) -> str | None:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None

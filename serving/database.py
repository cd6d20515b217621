"""The server's pool of connections: vector types registered, a statement timeout, and no request left hanging."""

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import psycopg
from pgvector.psycopg import register_vector_async
from psycopg import IsolationLevel
from psycopg.rows import tuple_row
from psycopg.types import TypeInfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from polytower.postgres import OPTIONS, open_session_async
from serving.errors import NO_DATABASE, Problem
from serving.metrics import ServerMetrics

RENEWAL = 5.0  # seconds between two attempts to find a database that takes events


class Session(psycopg.AsyncConnection[Any]):
    """A connection that keeps the cursors of the statements that questions begin with."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._kept: dict[str, psycopg.AsyncCursor[Any]] = {}

    async def first(self, statement: str, parameters: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """A prepared statement's first row. A cursor that has run it before knows how to send and to read it."""
        cursor = self._kept.get(statement)
        if cursor is None:
            cursor = self._kept[statement] = self.cursor(row_factory=tuple_row)
        await cursor.execute(statement, parameters, prepare=True, binary=True)
        row: tuple[Any, ...] | None = await cursor.fetchone()
        return row

    async def exported(self) -> str:
        """The name under which another connection can see what this one's transaction sees, as long as it lasts."""
        row = await (await self.execute("select pg_export_snapshot()")).fetchone()
        assert row is not None
        return str(row[0])


class Database:
    """An AsyncConnectionPool that starts without Postgres and comes back when Postgres does.

    timeout: seconds that a statement may run, and that a request waits for a connection.
    """

    def __init__(self, url: str, metrics: ServerMetrics, *, size: int, timeout: float) -> None:
        self._metrics = metrics
        self._timeout = timeout
        self._renewed_at = -math.inf
        self._pool: AsyncConnectionPool[Session] = AsyncConnectionPool(
            url, connection_class=Session, min_size=1, max_size=size, open=False, configure=self._configure,
            timeout=timeout, reconnect_timeout=60,
            kwargs={"autocommit": True, "connect_timeout": 5, **OPTIONS},
        )  # fmt: skip

    async def open(self) -> None:
        """Starts connecting in the background."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Closes all connections."""
        await self._pool.close()

    @asynccontextmanager
    async def connection(self, timeout: float | None = None) -> AsyncIterator[Session]:
        """Lends a connection in autocommit mode. Raises Problem when none is to be had in time."""
        try:
            with self._metrics.stage("pool"):
                connection = await self._pool.getconn(timeout or self._timeout)
        except PoolTimeout as error:
            raise Problem(NO_DATABASE, "no connection to the database could be had in time; try again") from error
        try:
            yield connection
        except psycopg.OperationalError:
            if connection.broken:
                # Postgres went away: the others of the pool are dead too, and the next request should not find out.
                await self._pool.check()
            raise
        except psycopg.errors.ReadOnlySqlTransaction:
            await self._renew()
            raise
        finally:
            await self._pool.putconn(connection)

    async def _renew(self) -> None:
        """Makes new connections: a session stays read-only, and with the host that it found, when both have changed."""
        if monotonic() - self._renewed_at >= RENEWAL:
            self._renewed_at = monotonic()
            await self._pool.drain()

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Session]:
        """Lends a connection inside a transaction that sees one moment, and so one generation."""
        async with self.connection() as connection:
            await connection.set_isolation_level(IsolationLevel.REPEATABLE_READ)
            try:
                async with connection.transaction():
                    yield connection
            finally:
                if not connection.closed:
                    await connection.set_isolation_level(None)

    async def _configure(self, connection: Session) -> None:
        await open_session_async(connection, timeout=self._timeout)
        # An unmigrated database has no vectors yet; /readyz says so.
        if await TypeInfo.fetch(connection, "vector") is not None:
            await register_vector_async(connection)

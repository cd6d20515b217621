"""POST /v1/features: a feature service's answer as JSON or Arrow."""

import asyncio
import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg_pool import ConnectionPool

from feature_repo.schema import ITEM_ID, USER_ID
from polytower.errors import UserError
from polytower.postgres import OPTIONS, open_session
from serving.errors import UNKNOWN_SERVICE, UNUSABLE_FEATURES, Problem
from serving.metrics import ServerMetrics

if TYPE_CHECKING:
    import pyarrow as pa

ARROW = "application/vnd.apache.arrow.stream"
# Decoding, not waiting, is the larger part of a read: more threads would only take turns.
_THREADS = 2


class Features:
    """The feature reader in threads of its own: decoding columns would hold the event loop up.

    timeout: seconds that a statement may run, and that a request waits for a connection.
    """

    def __init__(self, url: str, metrics: ServerMetrics, *, timeout: float = 8.0) -> None:
        self._metrics = metrics

        def configure(connection: psycopg.Connection[Any]) -> None:
            open_session(connection, timeout=timeout)

        self._pool: ConnectionPool[psycopg.Connection[Any]] = ConnectionPool(
            url, min_size=0, max_size=_THREADS, open=False, timeout=timeout, name="features",
            configure=configure, kwargs={"connect_timeout": 5, **OPTIONS},
        )  # fmt: skip
        self._opened = Lock()
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="features")

    def open(self) -> None:
        """Starts to import what decodes columns, so that no request waits for it."""
        self._threads.submit(importlib.import_module, "pyarrow")

    async def fetch(self, service: str, entities: dict[str, list[str]], snapshot: str | None = None) -> "pa.Table":
        """One row per entity row. Raises Problem for an unknown service or entities that it cannot use.

        snapshot: what a connection that goes on lending its view has exported; None: now.
        """
        with self._metrics.stage("features"):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._fetch, service, entities, snapshot)

    async def of_candidates(
        self, service: str, user_id: str | None, item_ids: list[str], snapshot: str
    ) -> tuple["pa.Table", list[str]]:
        """(one row per candidate, names of the columns that are the user's). Raises Problem as fetch does.

        The service takes the item, and may take the user: then the question must name one.
        """
        with self._metrics.stage("features"):
            loop = asyncio.get_running_loop()
            asked = service, user_id, item_ids, snapshot
            return await loop.run_in_executor(self._threads, self._of_candidates, *asked)

    def close(self) -> None:
        """Ends the threads after what they are doing, and closes the connections."""
        self._threads.shutdown(cancel_futures=True)
        self._pool.close()

    def _fetch(self, service: str, entities: dict[str, list[str]], snapshot: str | None) -> "pa.Table":
        from serving.rank.features import fetch_features

        with self._connection() as connection, _as_problems():
            return fetch_features(connection, service, entities, snapshot)

    def _of_candidates(
        self, service: str, user_id: str | None, item_ids: list[str], snapshot: str
    ) -> tuple["pa.Table", list[str]]:
        from serving.rank.features import columns_of, fetch_features, keys_of

        with self._connection() as connection, _as_problems():
            keys = keys_of(service)
            if USER_ID in keys and user_id is None:
                raise UserError(f"feature service {service!r} takes a user: ask by {USER_ID}")
            given: dict[str, list[str]] = {ITEM_ID: item_ids}
            if USER_ID in keys and user_id is not None:
                given[USER_ID] = [user_id]
            # Without candidates there is no row to answer: one of nobody shows the columns.
            entities = given if item_ids else {key: [""] for key in given}
            table = fetch_features(connection, service, entities, snapshot)
            return table.slice(0, len(item_ids)), columns_of(service, USER_ID)

    @contextmanager
    def _connection(self) -> Iterator[psycopg.Connection[Any]]:
        with self._opened:
            self._pool.open()
        try:
            with self._pool.connection() as connection:
                yield connection
        except psycopg.OperationalError:
            # Postgres may have gone: the others of the pool are dead too, and the next request should not find out.
            self._pool.check()
            raise


@contextmanager
def _as_problems() -> Iterator[None]:
    from serving.rank.features import UnknownServiceError

    try:
        yield
    except UnknownServiceError as error:
        raise Problem(UNKNOWN_SERVICE, str(error)) from error
    except UserError as error:
        raise Problem(UNUSABLE_FEATURES, str(error)) from error


def with_columns(rows: "pa.Table | dict[str, list[str]]", further: "pa.Table") -> "pa.Table":
    """The rows (a table, or columns) with the columns of `further`, which has as many."""
    import pyarrow as pa

    table = pa.table(rows) if isinstance(rows, dict) else rows
    for name in further.column_names:
        table = table.append_column(name, further[name])
    return table


def as_arrow(table: "pa.Table") -> bytes:
    """The table as an Arrow IPC stream."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    answer: bytes = sink.getvalue().to_pybytes()
    return answer

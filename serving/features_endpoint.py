"""POST /v1/features: a feature service's answer as JSON or Arrow."""

import asyncio
import importlib
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg_pool import ConnectionPool

from polytower.errors import UserError
from polytower.postgres import connection_options
from serving.errors import UNKNOWN_SERVICE, UNUSABLE_FEATURES, Problem
from serving.metrics import Metrics

if TYPE_CHECKING:
    import pyarrow as pa

ARROW = "application/vnd.apache.arrow.stream"
# Decoding, not waiting, is the larger part of a read: more threads would only take turns.
_THREADS = 2


class Features:
    """The feature reader in threads of its own: decoding columns would hold the event loop up.

    timeout: seconds that a statement may run, and that a request waits for a connection.
    """

    def __init__(self, url: str, metrics: Metrics, *, timeout: float = 8.0) -> None:
        options = connection_options()
        options["options"] += f" -c statement_timeout={int(timeout * 1000)}"
        self._metrics = metrics
        self._pool: ConnectionPool[psycopg.Connection[Any]] = ConnectionPool(
            url, min_size=0, max_size=_THREADS, open=False, timeout=timeout, name="features",
            kwargs={"connect_timeout": 5, **options},
        )  # fmt: skip
        self._opened = Lock()
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="features")

    def open(self) -> None:
        """Starts to import what decodes columns, so that no request waits for it."""
        self._threads.submit(importlib.import_module, "pyarrow")

    async def fetch(self, service: str, entities: dict[str, list[str]]) -> "pa.Table":
        """One row per entity row. Raises Problem for an unknown service or entities that it cannot use."""
        with self._metrics.stage("features"):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._fetch, service, entities)

    def close(self) -> None:
        """Ends the threads after what they are doing, and closes the connections."""
        self._threads.shutdown(cancel_futures=True)
        self._pool.close()

    def _fetch(self, service: str, entities: dict[str, list[str]]) -> "pa.Table":
        from serving.features import UnknownServiceError, fetch_features

        with self._opened:
            self._pool.open()
        try:
            with self._pool.connection() as connection:
                return fetch_features(connection, service, entities)
        except psycopg.OperationalError:
            # Postgres may have gone: the others of the pool are dead too, and the next request should not find out.
            self._pool.check()
            raise
        except UnknownServiceError as error:
            raise Problem(UNKNOWN_SERVICE, str(error)) from error
        except UserError as error:
            raise Problem(UNUSABLE_FEATURES, str(error)) from error


def as_arrow(table: "pa.Table") -> bytes:
    """The table as an Arrow IPC stream."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    answer: bytes = sink.getvalue().to_pybytes()
    return answer

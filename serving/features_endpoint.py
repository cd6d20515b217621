"""POST /v1/features: Feast's answer as JSON or Arrow. Feast is imported when the first such request comes."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from polytower.errors import UserError
from serving.errors import UNKNOWN_SERVICE, UNUSABLE_FEATURES, Problem
from serving.metrics import Metrics

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import FeatureStore

ARROW = "application/vnd.apache.arrow.stream"


class Features:
    """Feast's store over the platform's database, in a thread of its own: its calls block."""

    def __init__(self, url: str, metrics: Metrics) -> None:
        self._url = url
        self._metrics = metrics
        self._store: FeatureStore | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")

    async def fetch(self, service: str, entities: dict[str, list[str]]) -> "pa.Table":
        """One row per entity row. Raises Problem for an unknown service or entities that it cannot use."""
        with self._metrics.stage("features"):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._fetch, service, entities)

    def close(self) -> None:
        """Ends the thread after what it is doing, and closes the store's connections."""
        self._thread.shutdown(cancel_futures=True)
        if self._store is not None:
            from feature_repo.store import close

            close(self._store)

    def _fetch(self, service: str, entities: dict[str, list[str]]) -> "pa.Table":
        from feature_repo.store import feature_store
        from serving.features import UnknownServiceError, fetch_features

        if self._store is None:
            self._store = feature_store(self._url)
        try:
            return fetch_features(self._store, service, entities)
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

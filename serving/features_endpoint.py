"""POST /v1/features: Feast's answer as JSON or Arrow. Feast is imported when the first such request comes."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from feature_repo.schema import ITEM_ID, USER_ID
from polytower.errors import UserError
from serving.errors import FEATURES_LOADING, NO_DATABASE, UNKNOWN_SERVICE, UNUSABLE_FEATURES, Problem
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

    async def ready(self, patience: float) -> None:
        """Waits until Feast is imported; the import goes on when somebody loses patience. Raises Problem."""
        if self._store is not None:
            return
        opening = asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        opening.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.wait_for(asyncio.shield(opening), patience)
        except TimeoutError as error:
            raise Problem(FEATURES_LOADING, "Feast is being imported; try again in a moment", retry_after=5) from error

    async def of_candidates(
        self, service: str, user_id: str | None, item_ids: list[str]
    ) -> tuple["pa.Table", list[str]]:
        """(one row per candidate, names of the columns that are the user's). Raises Problem as fetch does.

        The service takes the item, and may take the user: then the question must name one.
        """
        with self._metrics.stage("features"):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._of_candidates, service, user_id, item_ids)

    def close(self) -> None:
        """Ends the thread after what it is doing, and closes the store's connections."""
        self._thread.shutdown(cancel_futures=True)
        if self._store is not None:
            from feature_repo.store import close

            close(self._store)

    def _fetch(self, service: str, entities: dict[str, list[str]]) -> "pa.Table":
        from serving.features import fetch_features

        with _as_problems():
            return fetch_features(self._open(), service, entities)

    def _of_candidates(self, service: str, user_id: str | None, item_ids: list[str]) -> tuple["pa.Table", list[str]]:
        from serving.features import columns_of, fetch_features, keys_of

        with _as_problems():
            store = self._open()
            keys = keys_of(store, service)
            if USER_ID in keys and user_id is None:
                raise UserError(f"feature service {service!r} takes a user: ask by {USER_ID}")
            given: dict[str, list[str]] = {ITEM_ID: item_ids}
            if USER_ID in keys and user_id is not None:
                given[USER_ID] = [user_id]
            # Without candidates Feast has no row to answer: one of nobody shows it the columns.
            table = fetch_features(store, service, given if item_ids else {key: [""] for key in given})
            return table.slice(0, len(item_ids)), columns_of(store, service, USER_ID)

    def _open(self) -> "FeatureStore":
        from feature_repo.store import feature_store

        if self._store is None:
            store = feature_store(self._url)
            assert store.registry  # connects: a store that cannot is not kept
            self._store = store
        return self._store


@contextmanager
def _as_problems() -> Iterator[None]:
    from sqlalchemy.exc import OperationalError

    from serving.features import UnknownServiceError

    try:
        yield
    except OperationalError as error:  # Feast's registry has a connection of its own
        raise Problem(NO_DATABASE, "the database does not answer; try again") from error
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

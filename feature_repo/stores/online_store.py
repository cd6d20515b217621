"""Feast's online store over the platform's own tables: SQL, vector search and Feast see one copy.

Reads (online_reads.py) take the newest row of each entity, embeddings of the live generation, content of the active
encoders. Writes (online_writes.py) are idempotent, so that materialising our own history changes nothing. Feast's
vector search is not offered: measured wrong and slow (use serving/ or the SQL functions).
"""

import asyncio
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from threading import Lock
from typing import Any, Literal

import feast.metrics
import psycopg
from feast import FeatureView, RepoConfig
from feast.infra.online_stores.online_store import OnlineStore
from feast.online_response import OnlineResponse
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from feast.repo_config import FeastConfigBaseModel
from feast.utils import _get_cached_request_context, make_tzaware
from psycopg_pool import ConnectionPool
from pydantic import StrictInt, StrictStr

from feature_repo.columns import as_python
from feature_repo.stores.online_response import ColumnarResponse, FeatureColumn, as_proto
from feature_repo.views import VIEWS
from feature_repo.views.online_reads import OnlineRead, distinct, read_columns
from feature_repo.views.online_writes import Row, write_rows
from feature_repo.views.view import View
from polytower.errors import UserError
from polytower.postgres import OPTIONS, open_session

# One feature view to read: the view, the wanted features, its join key
_Part = tuple[Any, list[str], str]


class PolytowerOnlineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]
    """The `online_store` section of feature_store.yaml: where the platform's database is."""

    type: Literal["feature_repo.stores.online_store.PolytowerOnlineStore"] = (
        "feature_repo.stores.online_store.PolytowerOnlineStore"
    )
    url: StrictStr
    pool_size: StrictInt = 8


class PolytowerOnlineStore(OnlineStore):  # type: ignore[misc]
    """Reads and writes the typed tables; creates and drops none (that is the migrations' job)."""

    def __init__(self) -> None:
        self._pool: ConnectionPool[psycopg.Connection[Any]] | None = None
        self._lock = Lock()

    def get_online_features(
        self,
        config: RepoConfig,
        features: Any,
        entity_rows: Any,
        registry: Any,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> OnlineResponse:
        """The newest values; plain requests (ids as strings, no on-demand views) stay in columns all the way.

        Feast's own path, taken for all others, gives the same values and costs several times more: it makes protobuf
        of every key and cell. All views of a request are read from one snapshot, hence from one generation.
        """
        columnar = _columnar(entity_rows)
        parts = None
        if not include_feature_view_version_metadata:
            parts = _plain_parts(registry, project, features, full_feature_names, columnar)
        if parts is None:
            answer: OnlineResponse = super().get_online_features(
                config,
                features,
                entity_rows,
                registry,
                project,
                full_feature_names,
                include_feature_view_version_metadata,
            )
            return answer
        keys = {key for _, _, key in parts}
        columns = [FeatureColumn(key, "text", ids, None, None) for key, ids in columnar.items() if key in keys]
        orders = {key: distinct(columnar[key]) for key in keys}
        reads = [OnlineRead(view.name, orders[key][0], names) for view, names, key in parts]
        with self.connection(config) as connection:
            answers = read_columns(connection, reads)
        for (view, names, key), read in zip(parts, answers, strict=True):
            order = orders[key][1]
            as_ofs = read.as_ofs if order is None else [read.as_ofs[place] for place in order]
            prefix = f"{view.projection.name_to_use()}__" if full_feature_names else ""
            kinds = VIEWS[view.name].kinds
            columns += [FeatureColumn(prefix + n, kinds[n], read.features[n], order, as_ofs) for n in names]
        return ColumnarResponse(columns)

    async def get_online_features_async(self, *args: Any, **kwargs: Any) -> OnlineResponse:
        """The same in a thread: conversion, not waiting, is the larger part of a read."""
        return await asyncio.to_thread(self.get_online_features, *args, **kwargs)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, ValueProto] | None]]:
        """The newest (timestamp, feature → value) of each entity in one query; (None, None) for an unknown entity."""
        kinds = _declared(table.name).kinds
        names = [name for name in requested_features or kinds if name in kinds]
        ids = [key.entity_values[0].string_val for key in entity_keys]
        with self.connection(config) as connection:
            (read,) = read_columns(connection, [OnlineRead(table.name, ids, names)])
        columns = [as_proto(kinds[name], as_python(kinds[name], read.features[name])) for name in names]
        cells = zip(*columns, strict=True) if columns else iter([()] * len(ids))
        return [
            (None, None) if as_of is None else (as_of, dict(zip(names, row, strict=True)))
            for as_of, row in zip(read.as_ofs, cells, strict=True)
        ]

    async def online_read_async(self, *args: Any, **kwargs: Any) -> Any:
        """online_read in a thread."""
        return await asyncio.to_thread(self.online_read, *args, **kwargs)

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[tuple[EntityKey, dict[str, ValueProto], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Writes rows in one transaction; see online_writes.py for what each view takes. Reports all rows handled.

        Raises UserError for a view that is not ours, a missing feature, or a change to an immutable generation.
        """
        _declared(table.name)
        rows = [Row(key.entity_values[0].string_val, make_tzaware(as_of), values) for key, values, as_of, _ in data]
        with self.connection(config) as connection:
            write_rows(connection, table.name, rows)
        if progress is not None:
            progress(len(rows))

    async def online_write_batch_async(self, *args: Any, **kwargs: Any) -> None:
        """online_write_batch in a thread."""
        await asyncio.to_thread(self.online_write_batch, *args, **kwargs)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to create or drop: the migrations own the tables, whatever the registry says."""

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to drop: `feast teardown` empties the registry, the data stays."""

    async def close(self) -> None:
        """For Feast's servers: the same as disconnect."""
        self.disconnect()

    def disconnect(self) -> None:
        """Closes the connections; the next use opens new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    @contextmanager
    def connection(self, config: RepoConfig) -> Iterator[psycopg.Connection[Any]]:
        """A connection of the pool; commits on a clean exit, rolls back otherwise."""
        with self._lock:
            if self._pool is None:
                self._pool = _open_pool(config.online_store)
                weakref.finalize(self, self._pool.close)
            pool = self._pool
        with pool.connection() as connection:
            yield connection


def _open_pool(config: PolytowerOnlineStoreConfig) -> ConnectionPool[psycopg.Connection[Any]]:
    return ConnectionPool(
        config.url, min_size=0, max_size=config.pool_size, kwargs=dict(OPTIONS), configure=_configure, open=True,
        name="feast-online",
    )  # fmt: skip


def _configure(connection: psycopg.Connection[Any]) -> None:
    open_session(connection)


def _declared(name: str) -> View:
    if name not in VIEWS:
        raise UserError(
            f"feature view {name!r} has no table behind it; the online store serves {', '.join(VIEWS)}. "
            "A new view is declared in feature_repo/views/"
        )
    return VIEWS[name]


def _columnar(entity_rows: Any) -> Mapping[str, Any]:
    """Entity rows as key → list; what is not a plain list of dictionaries passes through."""
    if not isinstance(entity_rows, list):
        columnar: Mapping[str, Any] = entity_rows
        return columnar
    if not entity_rows or any(row.keys() != entity_rows[0].keys() for row in entity_rows):
        return {}
    return {key: [row[key] for row in entity_rows] for key in entity_rows[0]}


def _plain_parts(
    registry: Any, project: str, features: Any, full_feature_names: bool, columnar: Mapping[str, Any]
) -> list[_Part] | None:
    """What to read, or None where the request needs Feast's general path (or its error messages)."""
    if feast.metrics._config.online_features or not _plain_ids(columnar):
        return None
    context = _get_cached_request_context(registry, project, features, full_feature_names)
    _, on_demand_views, join_keys, _, _, grouped, *_ = context
    if on_demand_views or any(not _plain_view(view) for view, _ in grouped):
        return None
    parts = [(view, names, join_keys[view.entities[0]]) for view, names in grouped]
    return parts if all(key in columnar for _, _, key in parts) else None


def _plain_ids(columnar: Mapping[str, Any]) -> bool:
    lists = list(columnar.values())
    return (
        bool(lists)
        and all(isinstance(ids, list) and len(ids) == len(lists[0]) for ids in lists)
        and len(lists[0]) > 0
        and all(type(value) is str for ids in lists for value in ids)
    )


def _plain_view(view: Any) -> bool:
    projection = view.projection
    return (
        view.name in VIEWS
        and len(view.entities) == 1
        and not projection.join_key_map
        and getattr(projection, "version_tag", None) is None
    )

"""Materialisation inside Postgres: sources and online tables share one database, so no row leaves it."""

from typing import Any, LiteralString, cast

import psycopg
from feast import FeatureView
from feast.infra.common.materialization_job import MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.dag.context import ColumnInfo
from feast.infra.compute_engines.local.compute import LocalComputeEngine, LocalComputeEngineConfig
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.compute_engines.utils import create_offline_store_retrieval_job
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from psycopg import sql

from feature_repo.columns import Kind
from feature_repo.schema import FEAST_SCHEMA
from feature_repo.stores.offline_store import PolytowerOfflineStoreConfig
from feature_repo.stores.online_store import PolytowerOnlineStore
from feature_repo.views import VIEWS
from feature_repo.views.online_writes import create_incoming, incoming_types, merge, refusals, refuse_changes, unequal
from feature_repo.views.view import View
from polytower.errors import UserError

# Kind → a feature as its source has it (times as microseconds since 1970) in the type of our column
VALUES: dict[Kind, LiteralString] = {
    "text": "{}",
    "json": "{}::jsonb",
    "integer": "{}",
    "moment": "'epoch'::timestamptz + {} * interval '1 microsecond'",
    "number": "nullif({}, 'NaN')",
    "flag": "{}",
    "texts": "{}",
    "reals": "{}",
    "halves": "{}",
    "moments": "case when {0} is not null then array("
    "select 'epoch'::timestamptz + micros * interval '1 microsecond' "
    "from unnest({0}) with ordinality as event (micros, place) order by place) end",
}


class PolytowerComputeEngineConfig(LocalComputeEngineConfig):  # type: ignore[misc]
    """The `batch_engine` section of feature_store.yaml."""

    type: str = "feature_repo.stores.engine.PolytowerComputeEngine"


class PolytowerComputeEngine(LocalComputeEngine):  # type: ignore[misc]
    """Feast's local engine, except for plain views whose source is in the online store's database.

    For those, Feast's own query of the source feeds the same statement as `online_write_batch` (online_writes.py), in
    one transaction: same rows, same refusals, and none of the way out to Python and back.
    """

    def _materialize_one(self, registry: Any, task: MaterializationTask, **options: Any) -> LocalMaterializationJob:
        view = task.feature_view
        if not (_plain(view) and self._one_database()):
            return super()._materialize_one(registry, task, **options)
        name = f"{view.name}-{task.start_time}-{task.end_time}"
        try:
            if not _held_already(view):
                source = self._source(registry, task)
                with self.online_store.connection(self.repo_config) as connection:
                    take(connection, VIEWS[view.name], source)
        except (UserError, psycopg.Error) as error:
            return LocalMaterializationJob(job_id=name, status=MaterializationJobStatus.ERROR, error=error)
        return LocalMaterializationJob(job_id=name, status=MaterializationJobStatus.SUCCEEDED)

    def _source(self, registry: Any, task: MaterializationTask) -> LiteralString:
        """The query that Feast's offline store has for the task: the newest row of each entity in its time."""
        view, source = task.feature_view, task.feature_view.batch_source
        columns = ColumnInfo(
            join_keys=[field.name for field in view.entity_columns],
            feature_cols=[field.name for field in view.features],
            ts_col=source.timestamp_field,
            created_ts_col=source.created_timestamp_column or None,
        )
        context = self.get_execution_context(registry, task)
        job = create_offline_store_retrieval_job(source, columns, context, task.start_time, task.end_time)
        return cast(LiteralString, job.to_sql())

    def _one_database(self) -> bool:
        """Whether the offline store's tables are next to ours, and one row per entity is asked for."""
        offline = self.repo_config.offline_store
        if not isinstance(offline, PolytowerOfflineStoreConfig) or not isinstance(
            self.online_store, PolytowerOnlineStore
        ):
            return False
        return bool(
            offline.url == self.repo_config.online_store.url
            and self.repo_config.materialization_config.pull_latest_features
        )


def take(connection: psycopg.Connection[Any], view: View, source: LiteralString) -> int:
    """Writes the rows of a query (key, `as_of`, features) online; answers how many stored rows were new or changed.

    Raises UserError for rows that the table refuses, or that would change what is immutable.
    """
    create_incoming(connection, view)
    day = [sql.SQL("(as_of at time zone 'UTC')::date")] if view.table is not None and view.table.daily else []
    values = [sql.SQL(VALUES[kind]).format(sql.Identifier(name)) for name, kind in view.kinds.items()]
    statement = sql.SQL("insert into incoming ({}) select {} from ({}) as source").format(
        sql.SQL(", ").join(map(sql.Identifier, incoming_types(view))),
        sql.SQL(", ").join([sql.Identifier(view.key), *day, sql.SQL("as_of"), *values]),
        sql.SQL(source),
    )
    with refusals(view):
        connection.execute(statement)
        if view.table is None:
            refuse_changes(connection, view)
            return 0
        if view.parallel:
            _same_lengths(connection, view)
        return merge(connection, view, view.table)


def _same_lengths(connection: psycopg.Connection[Any], view: View) -> None:
    first, *others = view.features
    differ = [
        sql.SQL("cardinality({}) not in ({}cardinality({}))").format(
            sql.Identifier(other.column), sql.SQL("0, " if other.sparse else ""), sql.Identifier(first.column)
        )
        for other in others
    ]
    statement = sql.SQL("select {key} from incoming where {differ} order by 1 limit 1").format(
        key=sql.Identifier(view.key), differ=sql.SQL(" or ").join(differ)
    )
    uneven = connection.execute(statement).fetchone()
    if uneven is not None:
        raise unequal(view, uneven[0])


def _held_already(view: FeatureView) -> bool:
    """Whether the source of an immutable view is where its rows are kept: they would be held against themselves."""
    at_home = view.batch_source.get_table_query_string() == f"{FEAST_SCHEMA}.{view.name}"
    return VIEWS[view.name].table is None and bool(at_home)


def _plain(view: FeatureView) -> bool:
    source = view.batch_source
    return (
        type(view) is FeatureView
        and view.name in VIEWS
        and view.online
        and not view.offline
        and isinstance(source, PostgreSQLSource)
        and source.timestamp_field == "as_of"
        and not source.field_mapping
        and {field.name for field in view.features} == VIEWS[view.name].kinds.keys()
    )

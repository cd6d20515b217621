"""Feast's offline store over the platform's own tables: training sets by index look-ups, the event itself left out."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast, get_args

import numpy as np
import pandas as pd
import psycopg
from feast import FeatureView
from feast.errors import FeastEntityDFMissingColumnsError
from feast.infra.offline_stores import offline_utils
from feast.infra.offline_stores.contrib.postgres_offline_store import postgres as feast_postgres
from feast.infra.offline_stores.contrib.postgres_offline_store import postgres_source as feast_postgres_source
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres import (
    PostgreSQLOfflineStore,
    PostgreSQLOfflineStoreConfig,
    PostgreSQLRetrievalJob,
    _get_entity_df_event_timestamp_range,
    _upload_entity_df,
)
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import FeatureViewQueryContext
from feast.infra.utils.postgres import connection_utils
from feast.infra.utils.postgres.postgres_config import PostgreSQLConfig
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from psycopg import sql
from pydantic import StrictStr

from feature_repo.schema import FEAST_SCHEMA, POINT_IN_TIME, PointInTime
from feature_repo.views import VIEWS
from polytower.errors import UserError
from polytower.postgres import OPTIONS, open_session


class PolytowerOfflineStoreConfig(PostgreSQLOfflineStoreConfig):  # type: ignore[misc]
    """The `offline_store` section of feature_store.yaml."""

    type: str = "feature_repo.stores.offline_store.PolytowerOfflineStore"
    url: StrictStr
    # Feast's own fields: the URL says all of it.
    host: StrictStr = ""
    database: StrictStr = ""
    user: StrictStr = ""
    password: StrictStr = ""


def _connect(config: PostgreSQLConfig) -> psycopg.Connection[Any]:
    """Feast's way to connect knows a few parts of a URL, and sends a search path that poolers refuse."""
    if not isinstance(config, PolytowerOfflineStoreConfig):
        connection: psycopg.Connection[Any] = _get_conn(config)
        return connection
    connection = psycopg.connect(config.url, **OPTIONS)
    open_session(connection, FEAST_SCHEMA)
    return connection


_get_conn = connection_utils._get_conn
for _module in (connection_utils, feast_postgres, feast_postgres_source):
    _module._get_conn = _connect


class PolytowerOfflineStore(PostgreSQLOfflineStore):  # type: ignore[misc]
    """Feast's Postgres store, with joins of its own (each view's `historical`) for the platform's views."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: Any,
        project: str,
        full_feature_names: bool = False,
        **options: Any,
    ) -> RetrievalJob:
        """One row per row of `entity_df` (a frame or a query), in any order.

        A column `point_in_time` says how the past is read, alike in all rows: strict (the default) gives what was
        recorded by then, backfilled content as it is now and the generation that was trained before.

        Requests without entities, over foreign sources or with renamed keys take Feast's own join, which lets an event
        see itself (`<=`). Raises FeastEntityDFMissingColumnsError, and UserError for a frame without rows.
        """
        if entity_df is None or any(options.values()) or not all(_plain(view) for view in feature_views):
            return PostgreSQLOfflineStore.get_historical_features(
                config, feature_views, feature_refs, entity_df, registry, project, full_feature_names, **options
            )
        schema = _schema(config, entity_df)
        point_in_time = _point_in_time(config, entity_df, schema)
        time_column = offline_utils.infer_event_timestamp_from_entity_df(schema)
        keys = offline_utils.get_expected_join_keys(project, feature_views, registry)
        if missing := keys - schema.keys():
            raise FeastEntityDFMissingColumnsError(keys, missing)
        span = _get_entity_df_event_timestamp_range(entity_df, time_column, config)
        views = offline_utils.get_feature_view_query_context(feature_refs, feature_views, registry, project, span)

        @contextmanager
        def query() -> Iterator[str]:
            table = offline_utils.get_temp_entity_table_name()
            _upload_entity_df(config, _aware(entity_df, time_column), table)
            try:
                yield _statement(
                    table, list(schema), time_column, sorted(keys), views, full_feature_names, point_in_time
                )
            finally:
                with _connect(config.offline_store) as connection:
                    connection.execute(sql.SQL("drop table if exists {}").format(sql.Identifier(table)))

        return PostgreSQLRetrievalJob(
            query=query,
            config=config,
            full_feature_names=full_feature_names,
            on_demand_feature_views=OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in schema if name != time_column],
                min_event_timestamp=span[0],
                max_event_timestamp=span[1],
            ),
        )


def _schema(config: RepoConfig, entity_df: pd.DataFrame | str) -> dict[str, np.dtype[Any]]:
    """Column → type; of a query, only times are told from the rest."""
    if isinstance(entity_df, pd.DataFrame):
        if entity_df.empty:
            raise UserError("the entity frame has no rows: a training set needs at least one entity and time")
        return dict(entity_df.dtypes)
    with _connect(config.offline_store) as connection:
        cursor = connection.execute(sql.SQL("select * from ({}) as given limit 0").format(sql.SQL(entity_df)))
        connection.rollback()
    times = {connection.adapters.types[name].oid for name in ("timestamptz", "timestamp")}
    return {
        column.name: np.dtype("datetime64[us]" if column.type_code in times else object)
        for column in cursor.description or ()
    }


def _point_in_time(config: RepoConfig, entity_df: pd.DataFrame | str, columns: Collection[str]) -> PointInTime:
    """How the rows ask for the past to be read. Raises UserError for another word, and for both in one frame."""
    if POINT_IN_TIME not in columns:
        return "strict"
    if isinstance(entity_df, pd.DataFrame):
        found = list(entity_df[POINT_IN_TIME].unique())
    else:
        query = sql.SQL("select distinct {} from ({}) as given limit 3")
        with _connect(config.offline_store) as connection:
            rows = connection.execute(query.format(sql.Identifier(POINT_IN_TIME), sql.SQL(entity_df))).fetchall()
            connection.rollback()
        found = [value for (value,) in rows]
    for mode in get_args(PointInTime):
        if found == [mode]:
            return cast(PointInTime, mode)
    raise UserError(
        f"the column {POINT_IN_TIME} has {', '.join(map(str, found[:3])) or 'no rows'}; it takes strict (what was "
        "recorded by then) or backfilled (content as it is now, the generation trained before), the same in all rows"
    )


def _plain(view: FeatureView) -> bool:
    source = view.batch_source
    return (
        view.name in VIEWS
        and getattr(source, "get_table_query_string", str)() == f"{FEAST_SCHEMA}.{view.name}"
        and not source.field_mapping
        and not view.projection.join_key_map
        and view.projection.name_to_use() == view.name
        and not view.ttl
    )


def _aware(entity_df: pd.DataFrame | str, time_column: str) -> pd.DataFrame | str:
    """Times without a zone, and times as text, are UTC, as everywhere in Feast."""
    if isinstance(entity_df, str):
        return entity_df
    return entity_df.assign(**{time_column: pd.to_datetime(entity_df[time_column], utc=True)})


def _statement(
    table: str,
    columns: Sequence[str],
    time_column: str,
    keys: Sequence[str],
    views: Sequence[FeatureViewQueryContext],
    full_feature_names: bool,
    point_in_time: PointInTime,
) -> str:
    """The entity table's columns, then the features of each view, joined by key and moment."""
    values = [sql.SQL("given.{}").format(sql.Identifier(name)) for name in columns]
    joins = []
    for view in views:
        prefix = f"{view.name}__" if full_feature_names else ""
        values += [
            sql.SQL("{}.{} as {}").format(*map(sql.Identifier, (view.name, name, prefix + name)))
            for name in view.features
        ]
        joins.append(
            sql.SQL(" left join lateral ({}) as {} on true").format(
                VIEWS[view.name].historical(point_in_time), sql.Identifier(view.name)
            )
        )
    return (
        sql.SQL(
            "select {values} from {table} as given cross join lateral (select {keys}, {time}::timestamptz as moment) "
            "as wanted{joins}"
        )
        .format(
            values=sql.SQL(", ").join(values),
            table=sql.Identifier(table),
            keys=sql.SQL(", ").join(sql.SQL("given.{0}::text as {0}").format(sql.Identifier(key)) for key in keys),
            time=sql.Identifier("given", time_column),
            joins=sql.Composed(joins),
        )
        .as_string()
    )

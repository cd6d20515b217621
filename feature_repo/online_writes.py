"""How feature rows are written online: binary COPY into a temporary table, then one statement into ours.

Histories (sequences, stats) and item attributes are upserted; a row that is already there is left untouched, an older
row never replaces a newer one. Generations and content embeddings are immutable: equal values pass, other values are
refused, since the index and the quality report belong to the values that were built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, LiteralString

import psycopg
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from psycopg import sql

from feature_repo.columns import Kind
from feature_repo.copy_rows import (
    COPY_END,
    COPY_START,
    FIELDS,
    copy_rows,
    joined,
    moment_cells,
    present,
    text_cells,
    value_cells,
)
from feature_repo.online_reads import ONLINE_VIEWS
from feature_repo.schema import (
    FEAST_SCHEMA,
    ITEM_ATTRIBUTES_VIEW,
    ITEM_CONTENT_VIEW,
    ITEM_EMBEDDING_VIEW,
    ITEM_STATS_VIEW,
    USER_INTERESTS_VIEW,
    USER_SEQUENCE_VIEW,
    USER_STATS_VIEW,
)
from polytower.errors import UserError

# Rows encoded at a time
_CHUNK = 500


@dataclass(frozen=True)
class Row:
    """One feature row: whose, when it became true (aware), feature → value."""

    entity: str
    as_of: datetime
    values: dict[str, ValueProto]


_SEQUENCE_UPSERT: LiteralString = """
insert into user_sequences as kept (user_id, day, as_of, item_ids, occurred_ats, kinds)
select user_id,
       (as_of at time zone 'UTC')::date,
       as_of,
       (string_to_array(item_ids, separator))[2:],
       occurred_ats,
       (string_to_array(kinds, separator))[2:]
from incoming
on conflict (user_id, day) do update
set as_of = excluded.as_of,
    item_ids = excluded.item_ids,
    occurred_ats = excluded.occurred_ats,
    kinds = excluded.kinds
where excluded.as_of >= kept.as_of
  and (kept.as_of, kept.item_ids, kept.occurred_ats, kept.kinds)
      is distinct from (excluded.as_of, excluded.item_ids, excluded.occurred_ats, excluded.kinds)
"""

_USER_STATS_UPSERT: LiteralString = """
insert into user_stats as kept (user_id, day, as_of, interactions, distinct_items, mean_value, first_at)
select user_id, (as_of at time zone 'UTC')::date, as_of, user_interactions, user_distinct_items, user_mean_value,
       'epoch'::timestamptz + user_first_at * interval '1 microsecond'
from incoming
on conflict (user_id, day) do update
set as_of = excluded.as_of,
    interactions = excluded.interactions,
    distinct_items = excluded.distinct_items,
    mean_value = excluded.mean_value,
    first_at = excluded.first_at
where excluded.as_of >= kept.as_of
  and (kept.as_of, kept.interactions, kept.distinct_items, kept.mean_value, kept.first_at)
      is distinct from
      (excluded.as_of, excluded.interactions, excluded.distinct_items, excluded.mean_value, excluded.first_at)
"""

_ITEM_STATS_UPSERT: LiteralString = """
insert into item_stats as kept (item_id, day, as_of, interactions, distinct_users, mean_value, first_at)
select item_id, (as_of at time zone 'UTC')::date, as_of, item_interactions, item_distinct_users, item_mean_value,
       'epoch'::timestamptz + item_first_at * interval '1 microsecond'
from incoming
on conflict (item_id, day) do update
set as_of = excluded.as_of,
    interactions = excluded.interactions,
    distinct_users = excluded.distinct_users,
    mean_value = excluded.mean_value,
    first_at = excluded.first_at
where excluded.as_of >= kept.as_of
  and (kept.as_of, kept.interactions, kept.distinct_users, kept.mean_value, kept.first_at)
      is distinct from
      (excluded.as_of, excluded.interactions, excluded.distinct_users, excluded.mean_value, excluded.first_at)
"""

# Columns that Feast does not know (image, path, checksum) keep what the loader wrote.
_ITEMS_UPSERT: LiteralString = """
insert into items as kept (item_id, title, description, available, attributes, updated_at)
select item_id, title, description, available, attributes::jsonb, as_of
from incoming
on conflict (item_id) do update
set title = excluded.title,
    description = excluded.description,
    available = excluded.available,
    attributes = excluded.attributes,
    updated_at = excluded.updated_at
where excluded.updated_at >= kept.updated_at
  and (kept.title, kept.description, kept.available, kept.attributes, kept.updated_at)
      is distinct from
      (excluded.title, excluded.description, excluded.available, excluded.attributes, excluded.updated_at)
"""

# View → statement that takes over the incoming rows; None: immutable
UPSERTS: dict[str, LiteralString | None] = {
    USER_SEQUENCE_VIEW: _SEQUENCE_UPSERT,
    USER_STATS_VIEW: _USER_STATS_UPSERT,
    ITEM_STATS_VIEW: _ITEM_STATS_UPSERT,
    ITEM_ATTRIBUTES_VIEW: _ITEMS_UPSERT,
    ITEM_CONTENT_VIEW: None,
    ITEM_EMBEDDING_VIEW: None,
    USER_INTERESTS_VIEW: None,
}


def write_rows(connection: psycopg.Connection[Any], view: str, rows: Sequence[Row]) -> int:
    """Writes the rows inside the caller's transaction and answers how many stored rows were new or changed.

    Raises UserError for a missing feature, a wrong type, a value that the table refuses, a change to what is immutable.
    """
    if not rows:
        return 0
    statement = UPSERTS[view]
    try:
        _copy(connection, view, rows if statement is None else _newest(view, rows))
        if statement is not None:
            return connection.execute(statement).rowcount
    except (psycopg.errors.IntegrityError, psycopg.errors.DataError) as error:
        raise UserError(f"feature view {view!r} refuses the rows: {error.diag.message_primary}") from error
    _refuse_changes(connection, view)
    return 0


def _newest(view: str, rows: Sequence[Row]) -> list[Row]:
    """One row per place in the table: the newest of each entity (and day, in a history), among equals the last.

    Ordered, so that two writers meet at the first row that both want and not in a deadlock.
    """
    kept: dict[Any, Row] = {}
    for row in rows:
        place = row.entity if view == ITEM_ATTRIBUTES_VIEW else (row.entity, row.as_of.astimezone(UTC).date())
        if place not in kept or row.as_of >= kept[place].as_of:
            kept[place] = row
    return sorted(kept.values(), key=lambda row: (row.entity, row.as_of))


def _copy(connection: psycopg.Connection[Any], view: str, rows: Sequence[Row]) -> None:
    """Fills the temporary table; Postgres takes one chunk in while the next one is encoded."""
    online = ONLINE_VIEWS[view]
    features = {name: kind for name, (_, kind) in online.features.items()}
    types = {online.key: "text", "as_of": "timestamptz", "separator": "text"}
    types |= {name: FIELDS[kind][1] for name, kind in features.items()}
    names = sql.SQL(", ").join(sql.Identifier(name) for name in types)
    copy_in = sql.SQL("copy incoming ({}) from stdin (format binary)").format(names)
    connection.execute(_incoming(types))
    with connection.cursor() as cursor, cursor.copy(copy_in) as copy:
        copy.write(COPY_START)
        for start in range(0, len(rows), _CHUNK):
            copy.write(copy_rows(_cells(view, features, rows[start : start + _CHUNK])))
        copy.write(COPY_END)


def _cells(view: str, features: Mapping[str, Kind], rows: Sequence[Row]) -> list[list[bytes]]:
    values = {name: present(name, kind, _column(view, name, rows)) for name, kind in features.items()}
    if view == USER_SEQUENCE_VIEW:
        _same_lengths(rows, values)
    separator, texts = joined({name: values[name] for name, kind in features.items() if kind == "texts"})
    values |= texts
    return [
        text_cells([row.entity for row in rows]),
        moment_cells([row.as_of for row in rows]),
        text_cells([separator]) * len(rows),
        *(value_cells(kind, values[name]) for name, kind in features.items()),
    ]


def _incoming(types: Mapping[str, str]) -> sql.Composed:
    """The temporary table; its rows stay uncompressed, since they live for one statement."""
    definitions = sql.SQL(", ").join(sql.SQL("{} {}").format(sql.Identifier(n), sql.SQL(t)) for n, t in types.items())
    return sql.SQL(
        "drop table if exists pg_temp.incoming; create temporary table incoming "
        "({}) with (toast_tuple_target = 8160) on commit drop"
    ).format(definitions)


def _column(view: str, name: str, rows: Sequence[Row]) -> list[ValueProto]:
    missing = next((row for row in rows if name not in row.values), None)
    if missing is not None:
        raise UserError(f"feature view {view!r}: the row of {missing.entity!r} lacks the feature {name!r}")
    return [row.values[name] for row in rows]


def _same_lengths(rows: Sequence[Row], values: Mapping[str, Sequence[Any]]) -> None:
    """A sequence is three lists side by side; absent ones are left to the table, which refuses them."""
    for row, *lists in zip(rows, *values.values(), strict=True):
        if len({len(each) for each in lists if each is not None}) > 1:
            raise UserError(f"the sequence of user {row.entity!r} has lists of unequal lengths: {', '.join(values)}")


def _refuse_changes(connection: psycopg.Connection[Any], view: str) -> None:
    online = ONLINE_VIEWS[view]
    different = connection.execute(
        sql.SQL(
            "select {key} from incoming where not exists (select from {stored} as stored "
            "where stored.{key} = incoming.{key} and ({kept}) is not distinct from ({given})) order by 1 limit 1"
        ).format(
            key=sql.Identifier(online.key),
            stored=sql.Identifier(FEAST_SCHEMA, view),
            kept=sql.SQL(", ").join(sql.Identifier("stored", name) for name in online.features),
            given=sql.SQL(", ").join(sql.Identifier("incoming", name) for name in online.features),
        )
    ).fetchone()
    if different is not None:
        raise UserError(
            f"feature view {view!r} is immutable and the row of {different[0]!r} differs from what is stored: "
            "embeddings change by encoding content, or by building and promoting a generation (`polytower materialize`)"
        )

"""How feature rows are written online: binary COPY straight into our table, or through a temporary one where rows meet.

Views with a table are upserted; a row that is already there is left untouched, an older row never replaces a newer one.
The others (generations, content embeddings) are immutable: equal values pass, other values are refused, since the index
and the quality report belong to the values that were built.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, LiteralString

import psycopg
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from psycopg import sql

from feature_repo.columns import COPY_END, COPY_START
from feature_repo.copy_rows import (
    FIELDS,
    copy_rows,
    day_cells,
    moment_cells,
    present,
    text_cells,
    value_cells,
)
from feature_repo.schema import FEAST_SCHEMA
from feature_repo.views import VIEWS
from feature_repo.views.view import Table, View
from polytower.errors import UserError

# Rows encoded at a time: Postgres takes one chunk in while the next one is encoded
_CHUNK = 250


@dataclass(frozen=True)
class Row:
    """One feature row: whose, when it became true (aware), feature → value."""

    entity: str
    as_of: datetime
    values: dict[str, ValueProto]


def write_rows(connection: psycopg.Connection[Any], name: str, rows: Sequence[Row]) -> int:
    """Writes the view's rows inside the caller's transaction and answers how many stored rows were new or changed.

    Raises UserError for a missing feature, a wrong type, a value that the table refuses, a change to what is immutable.
    """
    if not rows:
        return 0
    view = VIEWS[name]
    with refusals(view):
        if view.table is None:
            _stage(connection, view, rows)
            refuse_changes(connection, view)
            return 0
        return _write(connection, view, view.table, _newest(view.table, rows))


@contextmanager
def refusals(view: View) -> Iterator[None]:
    """What Postgres says about the rows becomes a UserError."""
    try:
        yield
    except (psycopg.errors.IntegrityError, psycopg.errors.DataError) as error:
        raise UserError(f"feature view {view.name!r} refuses the rows: {error.diag.message_primary}") from error


def _write(connection: psycopg.Connection[Any], view: View, table: Table, rows: Sequence[Row]) -> int:
    """Rows of new places go straight into the table, at half the price; the others meet what is there."""
    known = _known(connection, view, table, rows) if table.daily else set(range(len(rows)))
    fresh = [row for place, row in enumerate(rows) if place not in known]
    met: Sequence[Row] = [rows[place] for place in sorted(known)]
    try:
        with connection.transaction():
            if fresh:
                _copy(connection, view, sql.Identifier(table.name), fresh)
    except psycopg.errors.UniqueViolation:
        # Another writer was there between the look and the COPY.
        fresh, met = [], rows
    if not met:
        return len(fresh)
    _stage(connection, view, met)
    return len(fresh) + merge(connection, view, table)


def merge(connection: psycopg.Connection[Any], view: View, table: Table) -> int:
    """Takes over the incoming rows that are new or differ; answers how many. Rows that stay are not even locked."""
    columns = [table.as_of, *view.columns]
    place = [view.key, "day"] if table.daily else [view.key]
    statement = sql.SQL(
        "insert into {table} as kept ({place}, {columns}) select {place}, {columns} from incoming where not exists ("
        "select from {table} as stored where ({stored_place}) = ({given_place}) "
        "and (stored.{as_of} > incoming.{as_of} or ({stored}) is not distinct from ({given}))) "
        "on conflict ({place}) do update set ({columns}) = row({excluded}) "
        "where excluded.{as_of} >= kept.{as_of} and ({kept}) is distinct from ({excluded})"
    ).format(
        table=sql.Identifier(table.name),
        as_of=sql.Identifier(table.as_of),
        place=_names(place),
        columns=_names(columns),
        stored_place=_names(place, "stored"),
        given_place=_names(place, "incoming"),
        stored=_names(columns, "stored"),
        given=_names(columns, "incoming"),
        kept=_names(columns, "kept"),
        excluded=_names(columns, "excluded"),
    )
    return connection.execute(statement).rowcount


def create_incoming(connection: psycopg.Connection[Any], view: View) -> None:
    """The temporary table that rows come through: columns of the view's table, or the features of an immutable view.

    Its rows stay uncompressed, since they live for one statement.
    """
    definitions = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in incoming_types(view).items()
    )
    connection.execute(
        sql.SQL(
            "drop table if exists pg_temp.incoming; create temporary table incoming "
            "({}) with (toast_tuple_target = 8160) on commit drop"
        ).format(definitions)
    )


def incoming_types(view: View) -> dict[str, LiteralString]:
    """Column → type of the incoming table and of the COPY stream, in this order."""
    if view.table is None:
        return {view.key: "text", "as_of": "timestamptz"} | {name: FIELDS[kind][1] for name, kind in view.kinds.items()}
    day: dict[str, LiteralString] = {"day": "date"} if view.table.daily else {}
    return {view.key: "text", **day, view.table.as_of: "timestamptz"} | {
        column: FIELDS[view.kinds[feature]][1] for column, feature in view.columns.items()
    }


def refuse_changes(connection: psycopg.Connection[Any], view: View) -> None:
    """Raises UserError unless each incoming row of the immutable view is stored with equal values."""
    different = connection.execute(
        sql.SQL(
            "select {key} from incoming where not exists (select from {stored} as stored "
            "where stored.{key} = incoming.{key} and ({kept}) is not distinct from ({given})) order by 1 limit 1"
        ).format(
            key=sql.Identifier(view.key),
            stored=sql.Identifier(FEAST_SCHEMA, view.name),
            kept=_names(view.kinds, "stored"),
            given=_names(view.kinds, "incoming"),
        )
    ).fetchone()
    if different is not None:
        raise UserError(
            f"feature view {view.name!r} is immutable and the row of {different[0]!r} differs from what is stored: "
            "embeddings change by encoding content, or by building and promoting a generation (`polytower materialize`)"
            "; counts, by events"
        )


def unequal(view: View, entity: str) -> UserError:
    """What is told of a row whose lists should be parallel and are not."""
    return UserError(
        f"feature view {view.name!r}: the lists of {entity!r} are of unequal lengths: {', '.join(view.kinds)}"
    )


def _names(names: Iterable[str], *prefix: str) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(*prefix, name) for name in names)


def _newest(table: Table, rows: Sequence[Row]) -> list[Row]:
    """One row per place in the table: the newest of each entity (and day), among equals the last.

    Ordered, so that two writers meet at the first row that both want and not in a deadlock.
    """
    kept: dict[Any, Row] = {}
    for row in rows:
        place = (row.entity, row.as_of.astimezone(UTC).date()) if table.daily else row.entity
        if place not in kept or row.as_of >= kept[place].as_of:
            kept[place] = row
    return sorted(kept.values(), key=lambda row: (row.entity, row.as_of))


def _known(connection: psycopg.Connection[Any], view: View, table: Table, rows: Sequence[Row]) -> set[int]:
    """Which of the rows have a stored one of the same entity and day."""
    wanted = {"ids": [row.entity for row in rows], "days": [row.as_of.astimezone(UTC).date() for row in rows]}
    statement = sql.SQL(
        "select (position - 1)::integer from unnest(%(ids)b::text[], %(days)b::date[]) with ordinality "
        "as wanted (id, day, position) join {table} as stored on stored.{key} = id and stored.day = wanted.day"
    ).format(table=sql.Identifier(table.name), key=sql.Identifier(view.key))
    return {position for (position,) in connection.execute(statement, wanted)}


def _stage(connection: psycopg.Connection[Any], view: View, rows: Sequence[Row]) -> None:
    create_incoming(connection, view)
    _copy(connection, view, sql.Identifier("incoming"), rows)


def _copy(connection: psycopg.Connection[Any], view: View, table: sql.Identifier, rows: Sequence[Row]) -> None:
    copy_in = sql.SQL("copy {} ({}) from stdin (format binary)").format(table, _names(incoming_types(view)))
    with connection.cursor() as cursor, cursor.copy(copy_in) as copy:
        copy.write(COPY_START)
        for start in range(0, len(rows), _CHUNK):
            copy.write(copy_rows(cells(view, rows[start : start + _CHUNK])))
        copy.write(COPY_END)


def cells(view: View, rows: Sequence[Row]) -> list[list[bytes]]:
    """The rows' cells by column, in the order of `incoming_types`."""
    values = {name: present(name, kind, _column(view, name, rows)) for name, kind in view.kinds.items()}
    if view.parallel:
        _same_lengths(view, rows, values)
    moments = [row.as_of for row in rows]
    return [
        text_cells([row.entity for row in rows]),
        *([day_cells(moments)] if view.table is not None and view.table.daily else []),
        moment_cells(moments),
        *(value_cells(view.kinds[name], content) for name, content in values.items()),
    ]


def _column(view: View, name: str, rows: Sequence[Row]) -> list[ValueProto]:
    missing = next((row for row in rows if name not in row.values), None)
    if missing is not None:
        raise UserError(f"feature view {view.name!r}: the row of {missing.entity!r} lacks the feature {name!r}")
    return [row.values[name] for row in rows]


def _same_lengths(view: View, rows: Sequence[Row], values: Mapping[str, Sequence[Any]]) -> None:
    """Absent lists are left to the table, which refuses them. Sparse ones may be empty."""
    sparse = [each.sparse for each in view.features]
    for row, *lists in zip(rows, *values.values(), strict=True):
        told = [one for one, spare in zip(lists, sparse, strict=True) if one is not None and (one.val or not spare)]
        if len({len(each.val) for each in told}) > 1:
            raise unequal(view, row.entity)

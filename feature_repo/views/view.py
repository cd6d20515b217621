"""What a feature view is: one declaration, of which every way to read, write and describe it is made.

Without Feast, which definitions.py makes objects for: a server reads features and never imports it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import LiteralString

from psycopg import sql

from feature_repo.columns import Kind
from feature_repo.schema import ENTITIES, SERVICES, PointInTime

# Kind → how a value of our tables is sent online, and how it stands in a training set. Those not here: as they are.
_SENT: Mapping[Kind, LiteralString] = {
    "json": "({})::text",
    "moment": "feast.epoch_micros({})",
    "texts": "array_send({})",
    "halves": "halfvec_send({})",
    "moments": "array_send({})",
}
_TRAINED: Mapping[Kind, LiteralString] = {
    "json": "({})::text",
    "moment": "feast.epoch_micros({})",
    "halves": "({})::real[]",
    "moments": "feast.epoch_micros({})",
}


@dataclass(frozen=True)
class Feature:
    """One value of a view.

    name: unique among all views. kind: what its column holds. value: SQL over the view's row, in the type of our tables
    (halfvec, timestamptz, jsonb), since each reader converts by the kind; "": the column of the feature's name.
    sent: how it is sent online, where something is faster than the kind's own conversion of the value. sparse: in a
    parallel view, an empty list stands for one of empty texts.
    """

    name: LiteralString
    kind: Kind
    value: LiteralString = ""
    description: str = ""
    sent: LiteralString = ""
    sparse: bool = False

    @cached_property
    def column(self) -> LiteralString:
        """The value's SQL."""
        return self.value or self.name

    @cached_property
    def online(self) -> sql.Composable:
        """SQL of what an online read sends; feature_repo/columns.py decodes it."""
        return sql.SQL(self.sent) if self.sent else self._converted(_SENT)

    @cached_property
    def historical(self) -> sql.Composable:
        """SQL of the value in a training set, by its name."""
        return sql.SQL("{} as {}").format(self._converted(_TRAINED), sql.Identifier(self.name))

    def _converted(self, conversions: Mapping[Kind, LiteralString]) -> sql.Composable:
        return sql.SQL(conversions.get(self.kind, "{}")).format(sql.SQL(self.column))


@dataclass(frozen=True)
class Rows:
    """Where a view's row comes from: subqueries that give at most one row, given `wanted` with the entity's key.

    now: the row in force, with its time as `as_of`. before: the row that was in force at wanted.moment (timestamptz),
    knowing nothing of what happened then or later. backfilled: the row for a moment before anything was recorded, such
    as that of an old log: content as it is now, still no event of that moment or later; "": there is no other than
    before. Features are SQL over the columns of all, so all have the same. Tables are qualified: the two stores have
    search paths of their own.
    """

    now: LiteralString
    before: LiteralString
    backfilled: LiteralString = ""


@dataclass(frozen=True)
class Table:
    """The table in which a written row is kept: one row per entity and day (`day`), or (not daily) one per entity.

    as_of: its column for the time of the row. Columns that no feature names keep what others wrote there.
    """

    name: LiteralString
    daily: bool = True
    as_of: LiteralString = "as_of"


@dataclass(frozen=True)
class View:
    """A feature view.

    entity: whose features they are. services: the feature services that have it. table: what a write goes to; the
    features are then its columns. None: immutable, equal values pass and others are refused. parallel: all features are
    lists, of equal lengths (`Feature.sparse`). Feast's source is the SQL view of the same name in its schema, which a
    migration makes.
    """

    name: LiteralString
    entity: LiteralString
    description: str
    rows: Rows
    features: tuple[Feature, ...]
    services: tuple[str, ...]
    table: Table | None = None
    parallel: bool = False

    def __post_init__(self) -> None:
        if self.entity not in ENTITIES:
            raise ValueError(f"view {self.name}: no entity {self.entity!r}; there are {', '.join(ENTITIES)}")
        if unknown := set(self.services) - SERVICES.keys():
            raise ValueError(f"view {self.name}: no service {min(unknown)!r}; there are {', '.join(SERVICES)}")
        if len(self.kinds) < len(self.features):
            raise ValueError(f"view {self.name}: two features have one name")
        if self.table is not None:
            computed = [each.name for each in self.features if not each.column.isidentifier()]
            if computed:
                raise ValueError(f"view {self.name}: a row is written into columns, and {computed[0]} is computed")

    @cached_property
    def key(self) -> LiteralString:
        """The column of the entity's id."""
        return ENTITIES[self.entity]

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """Feature → its kind."""
        return {each.name: each.kind for each in self.features}

    @cached_property
    def columns(self) -> dict[LiteralString, LiteralString]:
        """Column → the feature kept there, of a view that can be written."""
        return {} if self.table is None else {each.column: each.name for each in self.features}

    def historical(self, point_in_time: PointInTime) -> sql.Composable:
        """The subquery of all its features at a moment."""
        row = self.rows.backfilled if point_in_time == "backfilled" else ""
        values = sql.SQL(", ").join(each.historical for each in self.features)
        return sql.SQL("select {} from ({}) as held").format(values, sql.SQL(row or self.rows.before))

    def online(self, names: tuple[str, ...]) -> sql.Composable:
        """The query of some features for the ids in the parameter `ids`: place among them (from 1), as_of, values."""
        by_name = {each.name: each for each in self.features}
        return sql.SQL(
            "with wanted as (select * from unnest(%(ids)b::text[]) with ordinality as wanted ({key}, position)) "
            "select position, {values} from wanted cross join lateral ({row}) as held"
        ).format(
            key=sql.Identifier(self.key),
            values=sql.SQL(", ").join([sql.SQL("as_of"), *(by_name[name].online for name in names)]),
            row=sql.SQL(self.rows.now),
        )


def newest_day(table: LiteralString, key: LiteralString) -> Rows:
    """Of a table with one row per entity and day: the newest one; the newest that is dated before the moment."""
    newest = sql.SQL("select * from polytower.{table} where {key} = wanted.{key}{before} order by as_of desc limit 1")
    names = {"table": sql.Identifier(table), "key": sql.Identifier(key)}
    return Rows(
        newest.format(**names, before=sql.SQL("")).as_string(),
        newest.format(**names, before=sql.SQL(" and as_of < wanted.moment")).as_string(),
    )

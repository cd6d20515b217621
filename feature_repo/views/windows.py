"""Events of the last days, of a user or of an item: two views made alike."""

from typing import LiteralString

from psycopg import sql

from feature_repo.schema import ENTITIES, RANKER_SERVICE
from feature_repo.views.view import Feature, Rows, View

# How many days a count looks back.
WINDOWS = (1, 7, 30, 365)

_ROW = sql.SQL(
    """
    select today::timestamp at time zone 'UTC' as as_of, {counts}
    from (select ({moment} at time zone 'UTC')::date as today) as asked
    cross join lateral (
        select interactions from polytower.{table}
        where {key} = wanted.{key} and day < today order by day desc limit 1
    ) as past
    """
)
# Of all that were counted, without those that lie before the window.
_COUNT = sql.SQL(
    """
    interactions - coalesce((
        select interactions from polytower.{table}
        where {key} = wanted.{key} and day < today - {days} order by day desc limit 1
    ), 0) as {name}"""
)


def windowed_counts(name: LiteralString, entity: LiteralString, table: LiteralString) -> View:
    """The view of an entity's events in the last days, from its table of cumulative counts by day.

    Whole days (UTC) that are over: the moment's own day counts with nothing. A part of it would tell whether the
    entity has later events on that day, since a day's row is known only after its last event.
    """
    return View(
        name=name,
        entity=entity,
        description=(
            "Events in the last days (UTC) that are over, the moment's own day not among them; "
            "none for who had no event before that day"
        ),
        services=(RANKER_SERVICE,),
        rows=Rows(now=_row(entity, table, "now()"), before=_row(entity, table, "wanted.moment")),
        features=tuple(
            Feature(f"{entity}_interactions_{days}d", "integer", description=_told(days)) for days in WINDOWS
        ),
    )


def _told(days: int) -> str:
    return "events of the day before" if days == 1 else f"events of the {days} days before"


def _row(entity: LiteralString, table: LiteralString, moment: LiteralString) -> LiteralString:
    names = {"table": sql.Identifier(table), "key": sql.Identifier(ENTITIES[entity])}
    counts = [
        _COUNT.format(**names, days=days, name=sql.Identifier(f"{entity}_interactions_{days}d")) for days in WINDOWS
    ]
    return _ROW.format(**names, counts=sql.SQL(", ").join(counts), moment=sql.SQL(moment)).as_string()

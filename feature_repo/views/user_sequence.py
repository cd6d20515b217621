"""A user's newest events, and the one place that says which events of a user any model gets to see."""

from typing import LiteralString

from psycopg import sql

from feature_repo.schema import RANKER_SERVICE, RETRIEVAL_SERVICE, SEQUENCE_LENGTH, USER, USER_ID
from feature_repo.views.view import Feature, Rows, Table, View, newest_day

# Oldest first; events of one moment in the order in which they were written.
ORDER: LiteralString = "occurred_at, position"
# SQL of a user's newest events before a moment, see newest_events.
_NEWEST_EVENTS = sql.SQL(
    """select event.item_id, event.occurred_at, event.kind, event.position, event.query
from polytower.interactions as event
where event.user_id = {user} and event.occurred_at < {before}
order by event.occurred_at desc, event.position desc
limit {length}"""
)


def newest_events(user: LiteralString, before: LiteralString) -> sql.Composed:
    """SQL of a user's newest events before a moment, at most SEQUENCE_LENGTH, in any order (ORDER puts them in theirs).

    user, before: SQL expressions. Columns: item_id, occurred_at, kind, position, query. An event at the moment itself
    is left out, so that a label is never among its own features; nothing else is: an item met twice is there twice,
    whatever the kinds, and whether or not a generation knows the item.
    """
    return _NEWEST_EVENTS.format(user=sql.SQL(user), before=sql.SQL(before), length=SEQUENCE_LENGTH)


# The last finished day, and of the moment's own day what came before the moment; the newest of both.
_BEFORE = sql.SQL(
    """
    select item_ids[cardinality(item_ids) - {length} + 1 :] as item_ids,
           occurred_ats[cardinality(occurred_ats) - {length} + 1 :] as occurred_ats,
           kinds[cardinality(kinds) - {length} + 1 :] as kinds,
           case when array_remove(newest.queries, '') = '{{}}' then '{{}}' else newest.queries end as queries
    from (
        select past.item_ids || today.item_ids[places.first : places.last] as item_ids,
               past.occurred_ats || today.occurred_ats[places.first : places.last] as occurred_ats,
               past.kinds || today.kinds[places.first : places.last] as kinds,
               -- a row without any query has none listed
               case when past.queries = '{{}}' then array_fill(''::text, array[cardinality(past.item_ids)])
                    else past.queries end
               || case when today.queries = '{{}}'
                       then array_fill(''::text, array[greatest(places.last - places.first + 1, 0)])
                       else today.queries[places.first : places.last] end as queries
        from (values (1)) as one (row)
        left join lateral (
            select * from polytower.user_sequences
            where user_id = wanted.user_id and as_of < wanted.moment order by as_of desc limit 1
        ) as past on true
        left join lateral (
            select * from polytower.user_sequences
            where user_id = wanted.user_id and day = (wanted.moment at time zone 'UTC')::date
              and as_of >= wanted.moment
        ) as today on true
        cross join lateral (
            select count(*) filter (where event <= past.as_of)::integer + 1 as first,
                   count(*) filter (where event < wanted.moment)::integer as last
            from unnest(today.occurred_ats) as event
        ) as places
        where past.user_id is not null or places.first <= places.last
    ) as joined
    cross join lateral (select queries[cardinality(queries) - {length} + 1 :] as queries) as newest
    """
)

VIEW = View(
    name="user_sequence",
    entity=USER,
    description="The newest interactions of a user, oldest first; one row per user and day with activity",
    services=(RETRIEVAL_SERVICE, RANKER_SERVICE),
    rows=Rows(
        now=newest_day("user_sequences", USER_ID).now,
        before=_BEFORE.format(length=SEQUENCE_LENGTH).as_string(),
    ),
    features=(
        Feature("item_ids", "texts"),
        Feature("occurred_ats", "moments", description="microseconds since 1970"),
        Feature("kinds", "texts"),
        Feature(
            "queries",
            "texts",
            description="what was searched for, '' for nothing; empty where no event has any",
            sparse=True,
        ),
    ),
    table=Table("user_sequences"),
    parallel=True,
)

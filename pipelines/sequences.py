"""Users' sequences and the statistics of users and items: one row per entity and day with activity.

Each row is the state at the end of its day (UTC), so that a point-in-time join by `as_of` never sees the future. The
journal `changed_days` is written by the transactions that change interactions and emptied by the refresh that has seen
them: neither a crash, nor a late event, nor a transaction that commits late is missed.
"""

from datetime import date
from typing import Any

import psycopg
from psycopg import sql

from feature_repo.schema import SEQUENCE_QUERY_CHARACTERS
from feature_repo.views.user_sequence import ORDER, newest_events
from polytower import locks

CHANGED = "select min(day), max(day) from changed_days"
# First of all statements: what it deletes was committed, and so were the interactions that the later ones read.
SEEN = "delete from changed_days where day between %(first)s and %(last)s"

# Whose rows may change: who was active in the range, or has rows there. Their days after the range follow along as far
# as rows exist (a late event moves them too); days without rows yet are in the journal.
DAYS = """
drop table if exists pg_temp.refreshed;
create temp table refreshed on commit drop as
with active as (
    select distinct {key} as id, (occurred_at at time zone 'UTC')::date as day
    from interactions
    where occurred_at >= {first}::timestamp at time zone 'UTC'
      and occurred_at < ({last} + 1)::timestamp at time zone 'UTC'
), touched as (
    select id from active union select {key} from {table} where day between {first} and {last}
)
select id, day from active
union all
select id, later.day from touched join {table} later on later.{key} = id and later.day > {last};
create unique index on refreshed (id, day);
analyze refreshed
"""

SEQUENCES = sql.SQL("""
insert into user_sequences as kept (user_id, day, as_of, item_ids, occurred_ats, kinds, queries)
select d.id, d.day, s.as_of, s.item_ids, s.occurred_ats, s.kinds, s.queries
from refreshed d
cross join lateral (
    select max(occurred_at) as as_of,
           array_agg(item_id order by {order}) as item_ids,
           array_agg(occurred_at order by {order}) as occurred_ats,
           array_agg(kind order by {order}) as kinds,
           -- '' where nothing was searched for, and no list at all where nothing ever was
           case when count(query_key(query)) = 0 then '{{}}'
                else array_agg(case when query_key(query) is null then '' else left(query, {characters}) end
                               order by {order}) end as queries
    from ({events}) newest
) s
where s.as_of >= d.day::timestamp at time zone 'UTC'
on conflict (user_id, day) do update
set as_of = excluded.as_of, item_ids = excluded.item_ids, occurred_ats = excluded.occurred_ats, kinds = excluded.kinds,
    queries = excluded.queries
where (kept.as_of, kept.item_ids, kept.occurred_ats, kept.kinds, kept.queries)
      is distinct from (excluded.as_of, excluded.item_ids, excluded.occurred_ats, excluded.kinds, excluded.queries)
""").format(
    order=sql.SQL(ORDER),
    characters=SEQUENCE_QUERY_CHARACTERS,
    events=newest_events("d.id", "(d.day + 1)::timestamp at time zone 'UTC'"),
)

# Cumulative from the first event on. Sums are numeric: their order, which a plan chooses, must not change a mean.
STATS = """
insert into {table} as kept ({key}, day, as_of, interactions, {distinct}, mean_value, first_at)
with events as (
    select {key} as id, (occurred_at at time zone 'UTC')::date as day, occurred_at, value::numeric as value,
           row_number() over (partition by {key}, {other} order by occurred_at, position) = 1 as first_meeting
    from interactions
    where {key} in (select id from refreshed)
      and occurred_at < ((select max(day) from refreshed) + 1)::timestamp at time zone 'UTC'
), daily as (
    select id, day, max(occurred_at) as as_of, min(occurred_at) as first_at, count(*) as interactions,
           count(*) filter (where first_meeting) as met, sum(value) as total, count(value) as valued
    from events group by id, day
), cumulative as (
    select id, day, as_of, sum(interactions) over history as interactions, sum(met) over history as met,
           sum(total) over history / nullif(sum(valued) over history, 0) as mean_value,
           min(first_at) over history as first_at
    from daily window history as (partition by id order by day)
)
select id, day, as_of, interactions, met, mean_value, first_at from cumulative join refreshed using (id, day)
on conflict ({key}, day) do update
set as_of = excluded.as_of, interactions = excluded.interactions, {distinct} = excluded.{distinct},
    mean_value = excluded.mean_value, first_at = excluded.first_at
where (kept.as_of, kept.interactions, kept.{distinct}, kept.mean_value, kept.first_at)
      is distinct from
      (excluded.as_of, excluded.interactions, excluded.{distinct}, excluded.mean_value, excluded.first_at)
"""

# Rows of days in the range whose events are gone.
STALE = """
delete from {table} t
where day between %(first)s and %(last)s and not exists (select from refreshed r where r.id = t.{key} and r.day = t.day)
"""


def changed_days(connection: psycopg.Connection[Any]) -> tuple[date, date] | None:
    """First and last day (UTC) whose interactions changed since the tables were refreshed; None when none did."""
    row = connection.execute(CHANGED).fetchone()
    return None if row is None or row[0] is None else (row[0], row[1])


def refresh_sequences(connection: psycopg.Connection[Any], first_day: date, last_day: date) -> dict[str, int]:
    """Brings user_sequences, user_stats and item_stats up to date for the days in the range, in one transaction.

    A sequence holds what `newest_events` finds before the end of the day, in its order.
    Later days that have rows already are corrected with them. Answers the rows written per table: new or different
    ones; a refresh of an unchanged range writes none. Raises ValueError when the range is empty.
    """
    if last_day < first_day:
        raise ValueError(f"the range {first_day} to {last_day} is empty")
    days = {"first": first_day, "last": last_day}
    written = {}
    with connection.transaction():
        locks.wait_in_transaction(connection, locks.SEQUENCES)
        connection.execute(SEEN, days)
        _find_days(connection, "user_sequences", "user_id", days)
        _drop_stale(connection, "user_sequences", "user_id", days)
        written["user_sequences"] = connection.execute(SEQUENCES).rowcount
        for table, key, other, distinct in (
            ("user_stats", "user_id", "item_id", "distinct_items"),
            ("item_stats", "item_id", "user_id", "distinct_users"),
        ):
            _find_days(connection, table, key, days)
            _drop_stale(connection, table, key, days)
            statement = sql.SQL(STATS).format(**_identifiers(table=table, key=key, other=other, distinct=distinct))
            written[table] = connection.execute(statement).rowcount
    return written


def _find_days(connection: psycopg.Connection[Any], table: str, key: str, days: dict[str, date]) -> None:
    # Several statements in one call take no parameters: the days are written into the text.
    literals = {name: sql.SQL("date {}").format(sql.Literal(day.isoformat())) for name, day in days.items()}
    connection.execute(sql.SQL(DAYS).format(**_identifiers(table=table, key=key), **literals))


def _drop_stale(connection: psycopg.Connection[Any], table: str, key: str, days: dict[str, date]) -> None:
    connection.execute(sql.SQL(STALE).format(**_identifiers(table=table, key=key)), days)


def _identifiers(**names: str) -> dict[str, sql.Identifier]:
    return {name: sql.Identifier(value) for name, value in names.items()}

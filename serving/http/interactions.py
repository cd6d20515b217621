"""POST /v1/interactions: a few events, taken all or none, by the same rules as `polytower load`."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg

from feature_repo.schema import MAX_AHEAD_SECONDS
from serving.errors import EVENT_CONFLICT, INVALID, UNKNOWN_ITEMS, Problem
from serving.models import InteractionModel, InteractionsAnswer

EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)

# Two servers that take the same event at once: the second waits, and then sees it.
LOCK_EVENTS = """
select pg_advisory_xact_lock(hashtextextended('event ' || event_id, 0))
from (select distinct event_id from unnest(%(event_ids)s::text[]) event_id order by event_id limit 1000) events
"""
UNKNOWN = """
select item_id from (select distinct item_id from unnest(%(item_ids)s::text[]) item_id) asked
where not exists (select from items i where i.item_id = asked.item_id) order by item_id limit 20
"""
TAKEN = """
select event_id, user_id, item_id, kind, occurred_at, value, query from interactions
where event_id <> '' and event_id = any (%(event_ids)s) limit 1000
"""
ENSURE_YEARS = "select ensure_interactions_year(variadic %(years)s::int[]) limit 1"
INSERT = """
insert into interactions (user_id, item_id, occurred_at, kind, event_id, value, query)
select user_id, item_id, occurred_at, kind, interaction_event_id(event_id, query), value, query
from unnest(%(user_ids)s::text[], %(item_ids)s::text[], %(times)s::timestamptz[], %(kinds)s::text[],
            %(event_ids)s::text[], %(values)s::double precision[], %(queries)s::text[])
     with ordinality e (user_id, item_id, occurred_at, kind, event_id, value, query, number)
where not exists (
    select from forgotten f where f.entity = 'user' and f.digest = sha256(convert_to(e.user_id, 'UTF8'))
    and e.occurred_at <= f.forgotten_at)
order by number
on conflict do nothing
"""


async def append(connection: psycopg.AsyncConnection[Any], events: Sequence[InteractionModel]) -> InteractionsAnswer:
    """Takes the events in one transaction. Raises Problem: an unseen item, an implausible time, a reused event id."""
    now = datetime.now(UTC)
    timed = [event if event.occurred_at else event.model_copy(update={"occurred_at": now}) for event in events]
    _check_times(timed, now)
    async with connection.transaction():
        await _check_items(connection, timed)
        fresh = await _without_replays(connection, events, timed)
        inserted = await _insert(connection, fresh) if fresh else 0
    return InteractionsAnswer(accepted=inserted, duplicates=len(events) - inserted)


def _check_times(events: Sequence[InteractionModel], now: datetime) -> None:
    for number, event in enumerate(events):
        assert event.occurred_at is not None
        if not event.occurred_at >= EARLIEST or (event.occurred_at - now).total_seconds() > MAX_AHEAD_SECONDS:
            detail = f"interactions.{number}.occurred_at: lies before 1970 or more than {MAX_AHEAD_SECONDS} s ahead"
            raise Problem(INVALID, detail, {"row": number})


async def _check_items(connection: psycopg.AsyncConnection[Any], events: Sequence[InteractionModel]) -> None:
    rows = await connection.execute(UNKNOWN, {"item_ids": [event.item_id for event in events]})
    unknown = [item_id async for (item_id,) in rows]
    if unknown:
        raise Problem(UNKNOWN_ITEMS, "load the items first; nothing of this request was taken", {"item_ids": unknown})


async def _without_replays(
    connection: psycopg.AsyncConnection[Any], given: Sequence[InteractionModel], timed: Sequence[InteractionModel]
) -> list[InteractionModel]:
    """The events that are new by their event id; a time that the sender left open agrees with any."""
    event_ids = [event.event_id for event in given if event.event_id]
    if not event_ids:
        return list(timed)
    await connection.execute(LOCK_EVENTS, {"event_ids": event_ids})
    rows = await connection.execute(TAKEN, {"event_ids": event_ids})
    taken: dict[str, tuple[Any, ...]] = {event_id: rest async for event_id, *rest in rows}
    fresh = []
    for event, complete in zip(given, timed, strict=True):
        user_id, item_id, kind, occurred_at, value, query = taken.get(event.event_id, _content(complete))
        if _content(complete) != (
            user_id,
            item_id,
            kind,
            occurred_at if event.occurred_at else complete.occurred_at,
            value,
            query,
        ):
            raise Problem(
                EVENT_CONFLICT,
                "one event id is one event; nothing of this request was taken",
                {"event_id": event.event_id},
            )
        if event.event_id not in taken:
            fresh.append(complete)
        if event.event_id:
            taken[event.event_id] = taken.get(event.event_id, _content(complete))
    return fresh


def _content(event: InteractionModel) -> tuple[Any, ...]:
    return event.user_id, event.item_id, event.kind, event.occurred_at, event.value, event.query


async def _insert(connection: psycopg.AsyncConnection[Any], events: Sequence[InteractionModel]) -> int:
    times = [event.occurred_at for event in events]
    years = sorted({time.astimezone(UTC).year for time in times if time})
    await connection.execute(ENSURE_YEARS, {"years": years})
    cursor = await connection.execute(
        INSERT,
        {
            "user_ids": [event.user_id for event in events],
            "item_ids": [event.item_id for event in events],
            "times": times,
            "kinds": [event.kind for event in events],
            "event_ids": [event.event_id for event in events],
            "values": [event.value for event in events],
            "queries": [event.query for event in events],
        },
    )
    return cursor.rowcount

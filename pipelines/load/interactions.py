"""Interactions: COPY into a staging table, the faults that only the database can see, and the insert.

Everything here runs inside the caller's transaction. Rows of a year met for the first time fill a bare table, which is
attached (and so indexed) afterwards: one index build at the end is several times faster than an insert into indexes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from psycopg import sql
from tqdm import tqdm

from feature_repo.schema import DEFAULT_KIND
from pipelines.load.columns import Checked, keys, numbers, text, times
from pipelines.load.contract import Batch, Source, check_columns
from pipelines.load.forgotten import leave_out_events
from pipelines.load.rejections import KEPT_PER_FILE, Rejection, Rejections

REQUIRED = ("user_id", "item_id", "occurred_at")
KNOWN = (*REQUIRED, "event_id", "kind", "value", "query")

# The position is drawn while the file streams in, so that it keeps the file's order whatever the insert's order is.
STAGE = """
create temp table staged_interactions (
    row bigint not null,
    user_id text not null,
    item_id text not null,
    occurred_at timestamptz not null,
    kind text not null,
    event_id text not null,
    value double precision,
    query text,
    position bigint not null default nextval('interaction_position')
) on commit drop
"""
COPY = """
copy staged_interactions (row, user_id, item_id, occurred_at, kind, event_id, value, query) from stdin (format csv)
"""

UNSEEN_ITEMS = """
with gone as (
    delete from staged_interactions s where not exists (select from items i where i.item_id = s.item_id)
    returning s.row, s.item_id
)
select count(*) over (), row, item_id, null::text from gone order by row limit %(limit)s
"""

# An event id stands for one event. Against the database first: the copy that is already there is the right one.
EVENTS_TAKEN_BEFORE = """
with gone as (
    delete from staged_interactions s using interactions i
    where s.event_id <> '' and i.event_id <> '' and i.event_id = s.event_id
      and (i.user_id, i.item_id, i.occurred_at, i.kind, i.value, i.query)
          is distinct from (s.user_id, s.item_id, s.occurred_at, s.kind, s.value, s.query)
    returning s.row, s.event_id
)
select count(*) over (), row, event_id, 'in the database' from gone order by row limit %(limit)s
"""
EVENTS_TAKEN_IN_FILE = """
with firsts as (
    select distinct on (event_id) * from staged_interactions where event_id <> '' order by event_id, row
), gone as (
    delete from staged_interactions s using firsts f
    where s.event_id = f.event_id
      and (f.user_id, f.item_id, f.occurred_at, f.kind, f.value, f.query)
          is distinct from (s.user_id, s.item_id, s.occurred_at, s.kind, s.value, s.query)
    returning s.row, s.event_id, f.row as first_row
)
select count(*) over (), row, event_id, 'row ' || first_row from gone order by row limit %(limit)s
"""

# After the checks of event ids: these are derived, and unique only within user, item, time and kind.
DERIVED_EVENT_IDS = """
update staged_interactions set event_id = interaction_event_id(event_id, query) where event_id = '' and query <> ''
"""

# Sorted by key: the first of equal rows wins, a user's rows lie together, and index pages are filled in order.
INSERT = """
insert into {table} (user_id, item_id, occurred_at, kind, event_id, value, query, position)
select distinct on (user_id, occurred_at, item_id, kind, event_id)
       user_id, item_id, occurred_at, kind, event_id, value, query, position
from staged_interactions
where {rows}
order by user_id, occurred_at, item_id, kind, event_id, row
on conflict do nothing
"""
FRESH_ROWS = """
occurred_at >= make_timestamptz(%(year)s, 1, 1, 0, 0, 0, 'UTC')
and occurred_at < make_timestamptz(%(year)s + 1, 1, 1, 0, 0, 0, 'UTC')
"""
OTHER_ROWS = "date_part('year', occurred_at at time zone 'UTC') <> all (%(fresh)s)"
ATTACH = """
alter table interactions attach partition {table}
for values from (make_timestamptz({year}, 1, 1, 0, 0, 0, 'UTC')) to (make_timestamptz({year} + 1, 1, 1, 0, 0, 0, 'UTC'))
"""
# The trigger on `interactions` does not see the rows of a table that is attached later.
JOURNAL = """
insert into changed_days
select distinct (occurred_at at time zone 'UTC')::date from staged_interactions
where date_part('year', occurred_at at time zone 'UTC') = any (%(fresh)s)
"""

# What was staged and not inserted is a replay, unless the stored row says something else.
KEYS_TAKEN = """
select count(*) over (), s.row, coalesce(s.value::text, ''), null::text
from staged_interactions s
join interactions i using (user_id, occurred_at, item_id, kind, event_id)
where i.position <> s.position and i.value is distinct from s.value
order by s.row limit %(limit)s
"""


def load_interactions(
    connection: psycopg.Connection[Any], source: Source, rejections: Rejections, *, progress: bool
) -> dict[str, int]:
    """Loads the file; counts of rows read, new, unchanged (replayed) and rejected."""
    connection.execute(STAGE)
    read, years, with_events = _stage(connection, source, rejections, progress=progress)
    forgotten = leave_out_events(connection)
    connection.execute("analyze staged_interactions")
    _reject(connection, source, rejections, UNSEEN_ITEMS, "item_id", "is in neither items nor the database")
    rejections.refuse_if_many(source.name, read)
    if with_events:
        for statement in (EVENTS_TAKEN_BEFORE, EVENTS_TAKEN_IN_FILE):
            _reject(
                connection,
                source,
                rejections,
                statement,
                "event_id",
                "already belongs to another event (duplicate key)",
            )
    connection.execute(DERIVED_EVENT_IDS)
    inserted = _insert(connection, sorted(years), progress=progress)
    if inserted < read - forgotten - rejections.rows(source.name):
        _reject(
            connection, source, rejections, KEYS_TAKEN, "value",
            "differs from that of the same user, item, time and kind (duplicate key; an event_id tells them apart)",
        )  # fmt: skip
    rejections.refuse_if_many(source.name, read)
    if inserted:
        connection.execute("analyze interactions")
    rejected = rejections.rows(source.name)
    unchanged = read - inserted - rejected - forgotten
    counts = {"read": read, "new": inserted, "unchanged": unchanged, "rejected": rejected}
    return counts | ({"forgotten": forgotten} if forgotten else {})


def _stage(
    connection: psycopg.Connection[Any], source: Source, rejections: Rejections, *, progress: bool
) -> tuple[int, set[int], bool]:
    """Copies the sound rows; answers rows read, years met, and whether any row has an event id."""
    read = 0
    years: set[int] = set()
    with_events = False
    with (
        tqdm(total=source.total_rows, desc=source.name, unit=" rows", disable=None if progress else True) as bar,
        connection.cursor() as cursor,
        cursor.copy(COPY) as copy,
    ):
        for batch in source.batches():
            table = checked_interactions(batch, rejections)
            copy.write(_as_csv(table))
            years.update(pc.unique(pc.year(table["occurred_at"])).to_pylist())
            with_events = with_events or bool(pc.any(pc.not_equal(table["event_id"], "")).as_py())
            read += batch.rows
            bar.update(batch.rows)
    return read, years, with_events


def checked_interactions(batch: Batch, rejections: Rejections) -> pa.Table:
    check_columns(batch, REQUIRED, KNOWN)
    checked = Checked(batch)
    checked.read_id("user_id")
    checked.read_id("item_id")
    checked.read("occurred_at", times)
    kind = checked.read("kind", keys)
    checked.columns["kind"] = pc.if_else(pc.equal(kind, ""), DEFAULT_KIND, kind)
    checked.read("event_id", keys)
    checked.read("value", numbers)
    checked.read("query", text)
    rejections.add_batch(checked)
    return checked.table()


def _as_csv(table: pa.Table) -> memoryview:
    # Quoted values and bare nulls: what Postgres reads as text and as null.
    buffer = BytesIO()
    pacsv.write_csv(table, buffer, pacsv.WriteOptions(include_header=False, quoting_style="all_valid"))
    return buffer.getbuffer()


def _reject(
    connection: psycopg.Connection[Any],
    source: Source,
    rejections: Rejections,
    statement: str,
    column: str,
    reason: str,
) -> None:
    """Runs a statement that answers (total, row, value, where) of faulty rows, and notes them."""
    rows = connection.execute(statement, {"limit": KEPT_PER_FILE}).fetchall()
    if rows:
        head = [
            Rejection(source.name, row, column, f"{reason} ({where})" if where else reason, value[:200])
            for _, row, value, where in rows
        ]
        rejections.add_counted(rows[0][0], head)


def _insert(connection: psycopg.Connection[Any], years: list[int], *, progress: bool) -> int:
    """Moves the staged rows to their partitions; answers how many are new."""
    fresh = [year for year in years if _create_bare(connection, year)]
    inserted = 0
    for year in tqdm(fresh, desc="index new years", unit=" years", disable=None if progress and fresh else True):
        inserted += _insert_rows(connection, _partition(year), FRESH_ROWS, {"year": year})
        connection.execute(sql.SQL(ATTACH).format(table=_partition(year), year=sql.Literal(year)))
    if fresh:
        connection.execute(JOURNAL, {"fresh": fresh})
    if len(fresh) < len(years):
        inserted += _insert_rows(connection, sql.Identifier("interactions"), OTHER_ROWS, {"fresh": fresh})
    return inserted


def _insert_rows(
    connection: psycopg.Connection[Any], table: sql.Identifier, rows: str, parameters: dict[str, Any]
) -> int:
    with _memory_for_sorting(connection):
        return connection.execute(sql.SQL(INSERT).format(table=table, rows=sql.SQL(rows)), parameters).rowcount


@contextmanager
def _memory_for_sorting(connection: psycopg.Connection[Any]) -> Iterator[None]:
    connection.execute("set local work_mem = '128MB'")
    yield
    connection.execute("set local work_mem to default")


def _partition(year: int) -> sql.Identifier:
    return sql.Identifier(f"interactions_y{year}")


def _create_bare(connection: psycopg.Connection[Any], year: int) -> bool:
    """Creates the year's table, not yet attached; False when there is one. The lock is ensure_interactions_year's."""
    name = f"interactions_y{year}"
    connection.execute("select pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])
    found = connection.execute("select to_regclass(%s)", [name]).fetchone()
    if found is not None and found[0] is not None:
        return False
    connection.execute(sql.SQL("create table {} (like interactions including defaults)").format(_partition(year)))
    return True

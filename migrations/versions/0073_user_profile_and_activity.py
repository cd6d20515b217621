"""Behind Feast's sources: what is known of users, and how many events users and items had in the last days.

Compatibility: three views more; nothing that was there changes.
"""

from alembic import op
from psycopg import sql

revision = "0073"
down_revision = "0071"
branch_labels = None
depends_on = None

PROFILE = """
create view feast.user_profile as
select user_id, updated_at as as_of, attributes::text as user_attributes
from users;
"""

WINDOWS = (1, 7, 30, 365)

# A row for each day that a count changes on: the day after one with events, and the days on which those events leave a
# window. The days counted are whole and over: feature_repo/views/windows.py says why.
ACTIVITY = sql.SQL("""
create view {view} as
with events as (
    select {key}, day, interactions - lag(interactions, 1, 0::bigint) over (partition by {key} order by day) as events
    from {table}
), days as (
    select {key}, day, sum(events) as events
    from (
        select * from events
        union all
        select {key}, day + later, 0 from events cross join unnest({changes}) as later
    ) as each
    group by {key}, day
), counted as (
    select {key}, day, min(day) over near as first_day, {counts}
    from days window near as (partition by {key} order by day)
)
select {key}, day::timestamp at time zone 'UTC' as as_of, {names}
from counted
where day > first_day and day <= (now() at time zone 'UTC')::date
""")
COUNT = sql.SQL(
    "coalesce(sum(events) over (near range between {days} * interval '1 day' preceding and interval '1 day' preceding),"
    " 0)::bigint as {name}"
)


def upgrade() -> None:
    op.execute(PROFILE)
    for entity in ("user", "item"):
        names = {days: sql.Identifier(f"{entity}_interactions_{days}d") for days in WINDOWS}
        view = ACTIVITY.format(
            view=sql.Identifier("feast", f"{entity}_activity"),
            key=sql.Identifier(f"{entity}_id"),
            table=sql.Identifier(f"{entity}_stats"),
            changes=sql.Literal([1, *(days + 1 for days in WINDOWS)]),
            counts=sql.SQL(", ").join(COUNT.format(days=days, name=name) for days, name in names.items()),
            names=sql.SQL(", ").join(names.values()),
        )
        op.execute(view.as_string())


def downgrade() -> None:
    op.execute("drop view feast.user_profile, feast.user_activity, feast.item_activity")

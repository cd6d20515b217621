"""Sequences and statistics against a plain Python reference, on logs drawn at random and on real ones."""

from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_repo.schema import SEQUENCE_LENGTH, SEQUENCE_QUERY_CHARACTERS
from pipelines.load.folder import load_folder
from pipelines.sequences import changed_days, refresh_sequences
from polytower.postgres import connect
from tests.factories import tiny_folder

Connection = psycopg.Connection[Any]
START = datetime(2023, 12, 30, tzinfo=UTC)
# (user, item, hours after START, value); few users, items and hours, so that ties and repeats are common.
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 3),
        st.integers(0, 119),
        st.one_of(st.none(), st.integers(1, 5).map(float)),
        st.sampled_from([None, None, " ", "zombies", "x" * 10_000]),
    ),
    max_size=40,
    unique_by=lambda event: event[:3],
)


@pytest.fixture
def connection(emptied: Connection) -> Connection:
    return emptied


def append(connection: Connection, events: list[tuple[Any, ...]]) -> None:
    """Writes events as any writer does, in this order: (user, item, hours, value), and what was searched for or not."""
    for year in (2023, 2024):
        connection.execute("select ensure_interactions_year(%s::int)", [year])
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into interactions (user_id, item_id, occurred_at, value, query) values (%s, %s, %s, %s, %s) "
            "on conflict do nothing",
            [
                (f"u{u}", f"i{i}", START + timedelta(hours=hours), value, *(query or [None]))
                for u, i, hours, value, *query in events
            ],
        )


def reference(connection: Connection) -> dict[str, dict[tuple[str, date], tuple[Any, ...]]]:
    """The three tables, by (id, day), computed event by event."""
    log = connection.execute(
        "select user_id, item_id, occurred_at, kind, value, coalesce(query, '') from interactions "
        "order by occurred_at, position"
    ).fetchall()
    tables: dict[str, dict[tuple[str, date], tuple[Any, ...]]] = {
        "user_sequences": {},
        "user_stats": {},
        "item_stats": {},
    }
    seen: dict[tuple[str, str], list[tuple[Any, ...]]] = defaultdict(list)
    for user, item, at, kind, value, query in log:
        for table, entity, other in (("user_stats", user, item), ("item_stats", item, user)):
            history = seen[table, entity]
            history.append((other, at, kind, value, query.strip()[:SEQUENCE_QUERY_CHARACTERS]))
            values = [found for *_, found, _ in history if found is not None]
            tables[table][entity, at.date()] = (
                at,
                len(history),
                len({found for found, *_ in history}),
                sum(values) / len(values) if values else None,
                history[0][1],
            )
        newest = seen["user_stats", user][-SEQUENCE_LENGTH:]
        items, times, kinds, _, queries = (list(column) for column in zip(*newest, strict=True))
        tables["user_sequences"][user, at.date()] = (at, items, times, kinds, queries if any(queries) else [])
    return tables


def stored(connection: Connection) -> dict[str, dict[tuple[str, date], tuple[Any, ...]]]:
    statements = {
        "user_sequences": "select user_id, day, as_of, item_ids, occurred_ats, kinds, queries from user_sequences",
        "user_stats": "select user_id, day, as_of, interactions, distinct_items, mean_value, first_at from user_stats",
        "item_stats": "select item_id, day, as_of, interactions, distinct_users, mean_value, first_at from item_stats",
    }
    return {
        table: {(row[0], row[1]): row[2:] for row in connection.execute(statement).fetchall()}
        for table, statement in statements.items()
    }


def assert_equal(connection: Connection) -> None:
    expected, found = reference(connection), stored(connection)
    assert found["user_sequences"] == expected["user_sequences"]
    for table in ("user_stats", "item_stats"):
        assert rounded(found[table]) == rounded(expected[table])


def rounded(rows: dict[tuple[str, date], tuple[Any, ...]]) -> dict[tuple[str, date], tuple[Any, ...]]:
    """Means to nine digits: Postgres sums decimals, Python sums floats."""
    return {
        key: tuple(round(value, 9) if isinstance(value, float) else value for value in row) for key, row in rows.items()
    }


def refresh_changed(connection: Connection) -> dict[str, int]:
    days = changed_days(connection)
    return refresh_sequences(connection, *days) if days else {}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=EVENTS, late=EVENTS, day_by_day=st.booleans())
def test_equal_to_the_reference(connection: Connection, first: list[Any], late: list[Any], day_by_day: bool) -> None:
    connection.execute("truncate interactions, changed_days, user_sequences, user_stats, item_stats")
    for events in (first, late):  # the second batch falls before, between and after the first
        append(connection, events)
        if day_by_day:
            for day in range(5):
                one = START.date() + timedelta(days=day)
                refresh_sequences(connection, one, one)
        else:
            refresh_changed(connection)
        assert_equal(connection)
        assert changed_days(connection) is None
    connection.commit()


def test_a_tiny_folder_with_loads_in_two_parts(connection: Connection, tmp_path: Path) -> None:
    load_folder(connection, tiny_folder(tmp_path / "a", users=5))
    assert refresh_changed(connection)["user_sequences"] > 0
    assert_equal(connection)
    load_folder(connection, tiny_folder(tmp_path / "b", users=8, seed=1))
    refresh_changed(connection)
    assert_equal(connection)


def test_an_unchanged_range_writes_nothing(connection: Connection, tmp_path: Path) -> None:
    load_folder(connection, tiny_folder(tmp_path))
    days = changed_days(connection)
    assert days is not None
    assert set(refresh_sequences(connection, *days)) == {"user_sequences", "user_stats", "item_stats"}
    assert refresh_sequences(connection, *days) == {"user_sequences": 0, "user_stats": 0, "item_stats": 0}


def test_a_long_history_keeps_the_newest(connection: Connection) -> None:
    append(connection, [(0, n % 7, n // 100, None) for n in range(10_000) if n % 100 < 7])
    refresh_changed(connection)
    assert_equal(connection)
    lengths = connection.execute("select max(cardinality(item_ids)) from user_sequences").fetchone()
    assert lengths == (SEQUENCE_LENGTH,)


def test_deleted_interactions_leave_no_rows(connection: Connection) -> None:
    append(connection, [(0, 0, 1, 1.0), (0, 1, 30, 2.0), (1, 1, 31, None), (0, 2, 60, None)])
    refresh_changed(connection)
    connection.execute("delete from interactions where item_id = 'i1'")
    assert changed_days(connection) == (date(2023, 12, 31), date(2023, 12, 31))
    refresh_changed(connection)
    assert_equal(connection)
    assert not any(user == "u1" for user, _ in stored(connection)["user_sequences"])


def test_a_transaction_that_commits_late_is_not_missed(connection: Connection, emptied_database: str) -> None:
    append(connection, [(0, 0, 1, None)])
    connection.commit()
    with connect(emptied_database) as slow:
        append(slow, [(0, 1, 2, None)])  # its positions are drawn, its commit is still to come
        append(connection, [(0, 2, 3, None)])
        refresh_changed(connection)
        assert changed_days(connection) is None
        connection.commit()
    assert changed_days(connection) == (START.date(), START.date())
    refresh_changed(connection)
    assert_equal(connection)


def test_a_refresh_that_fails_forgets_nothing(connection: Connection) -> None:
    append(connection, [(0, 0, 1, None)])
    connection.execute("alter table item_stats add constraint act check (interactions < 0)")
    connection.commit()
    days = changed_days(connection)
    with pytest.raises(psycopg.errors.CheckViolation):
        refresh_changed(connection)
    connection.rollback()
    connection.execute("alter table item_stats drop constraint act")
    assert changed_days(connection) == days
    assert stored(connection)["user_sequences"] == {}


def test_an_empty_range_is_an_error(connection: Connection) -> None:
    assert changed_days(connection) is None
    with pytest.raises(ValueError, match="is empty"):
        refresh_sequences(connection, date(2024, 1, 2), date(2024, 1, 1))

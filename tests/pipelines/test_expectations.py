"""The suites on real Postgres: sound data passes, each fault is named with some of its rows, nothing large is kept."""

from pathlib import Path
from typing import Any

import psycopg
import pytest

from pipelines import expectations
from pipelines.expectations import Report, validate
from pipelines.load.folder import load_folder
from polytower.postgres import connect
from tests.factories import tiny_folder

# Great Expectations and its dependencies warn about their own code when they are imported.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FAULTS: dict[str, dict[str, str]] = {
    "interactions": {
        "no user_id is empty or longer than 500 bytes": "update interactions set user_id = '' where position = 1",
        "no item_id is empty or longer than 500 bytes": """
            update interactions set item_id = repeat('日', 167) where position = 1""",
        "interaction times are after 1970 and at most 300 s in the future": """
            insert into interactions (user_id, item_id, occurred_at)
            values ('u1', 'i1', now() + interval '1 hour')""",
        "no kind is empty or longer than 500 bytes": """
            update interactions set kind = repeat('k', 501) where position = 1""",
        "no event_id is longer than 500 bytes": """
            update interactions set event_id = repeat('e', 501) where position = 1""",
        "values are finite numbers": "update interactions set value = 'NaN' where position = 7",
    },
    "items": {
        "no item_id is empty or longer than 500 bytes": "update items set item_id = '' where item_id = 'i59'",
        "attributes are JSON objects": "update items set attributes = '[1]' where item_id = 'i3'",
    },
}
WARNINGS = {
    "interactions": {
        "every interaction has its item": "delete from items where item_id = 'i5'",
        "at most 5 % of the interactions repeat another one at the same instant": """
            insert into interactions (user_id, item_id, occurred_at, event_id)
            select user_id, item_id, occurred_at, 'again' from interactions limit 100""",
    },
    "items": {
        "at least half of the items have content of some modality": """
            update items set title = null, description = null, attributes = '{}' where item_id < 'i50'""",
        "at most half of the items share their title with another one": "update items set title = 'same'",
    },
}


@pytest.fixture
def loaded(database: str, tmp_path: Path) -> str:
    with connect(database) as connection:
        load_folder(connection, tiny_folder(tmp_path / "data"))
        connection.execute("select ensure_interactions_year(extract(year from now() + interval '2 days')::int)")
    return database


def spoiled(url: str, table: str, statement: str) -> Report:
    """The report after one fault; the fault is taken back by hand, since Great Expectations has its own connection."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("set search_path = polytower, public")
        for kept in ("items", "interactions"):
            connection.execute(f"create table kept_{kept} as select * from {kept}")  # type: ignore[call-overload]
        connection.execute(statement)  # type: ignore[call-overload]
        try:
            return validate(url, table)
        finally:
            for kept in ("items", "interactions"):
                connection.execute(f"delete from {kept}")  # type: ignore[call-overload]
                connection.execute(f"insert into {kept} select * from kept_{kept}")  # type: ignore[call-overload]
                connection.execute(f"drop table kept_{kept}")  # type: ignore[call-overload]


def test_sound_tables_pass(loaded: str) -> None:
    for table in expectations.SUITES:
        report = validate(loaded, table)
        assert [str(finding) for finding in report.broken] == []
        assert len(report.findings) >= 8
        assert not report.blocking


def test_each_fault_is_named_with_a_sample(loaded: str) -> None:
    for table, faults in FAULTS.items():
        for name, statement in faults.items():
            report = spoiled(loaded, table, statement)
            finding = report.broken[0]  # an id that changed has lost its item, too
            assert finding.expectation == name
            assert report.blocking, name
            assert 1 <= len(finding.sample) <= expectations.SAMPLE, finding
            assert finding.observed >= 1, finding
            assert "such as" in str(finding)


def test_suspicious_tables_warn_and_do_not_block(loaded: str) -> None:
    for table, faults in WARNINGS.items():
        for name, statement in faults.items():
            report = spoiled(loaded, table, statement)
            assert [finding.expectation for finding in report.broken] == [name]
            assert not report.blocking, name


def test_empty_tables_are_refused(database: str) -> None:
    for table, name in (("interactions", "there are interactions"), ("items", "there are items")):
        report = validate(database, table)
        assert [finding.expectation for finding in report.broken] == [name]
        assert report.blocking


def test_findings_hold_no_frames(loaded: str) -> None:
    with connect(loaded) as connection:
        connection.execute("update interactions set value = 'Infinity'")
    broken = validate(loaded, "interactions").broken
    assert [len(finding.sample) for finding in broken] == [expectations.SAMPLE]
    assert broken[0].observed == 640


def test_no_connection_stays_open(loaded: str) -> None:
    def sessions(connection: psycopg.Connection[Any]) -> int:
        row = connection.execute(
            "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        ).fetchone()
        assert row is not None
        return int(row[0])

    with connect(loaded) as connection:
        before = sessions(connection)
        validate(loaded, "items")
        assert sessions(connection) == before


def test_a_password_of_signs_reaches_the_server(loaded: str) -> None:
    url = loaded + "?application_name=a%20%24%7Bb%7D%25"
    assert not validate(url, "items").broken

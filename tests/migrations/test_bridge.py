"""Databases of mains before the squash: upgraded they hold all they held, answer the same, and are like new ones.

old_REVISION.sql.gz: pg_dump of a database made by that main, with data, and with a table `public.asked` of statements
and what they answered there. Goes with migrations/bridge.py.
"""

import gzip
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

import migrations
from polytower.cluster import programs
from polytower.errors import UserError
from polytower.postgres import DATABASE, connect

DUMPS = sorted(Path(__file__).parent.glob("old_*.sql.gz"))


@pytest.fixture(params=DUMPS, ids=lambda path: path.name.split(".")[0])
def old(server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of the old database as it was."""
    name = f"test_bridge_{os.getpid()}"
    root = server.removesuffix(DATABASE) + "postgres"
    with psycopg.connect(root, autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    try:
        url = server.removesuffix(DATABASE) + name
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(gzip.decompress(request.param.read_bytes()))
        yield url
    finally:
        with psycopg.connect(root, autocommit=True) as admin:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def test_an_old_database_upgrades_without_loss_and_answers_the_same(old: str, server: str) -> None:
    migrations.upgrade(old)
    with connect(old) as connection:
        connection.execute("set timezone = 'UTC'")
        asked = connection.execute("select statement, answer from public.asked").fetchall()
        assert len(asked) > 40
        for statement, answer in asked:
            row = connection.execute(statement).fetchone()
            assert row is not None
            if "from changed_days" in statement:  # days with queries are asked for again
                assert all(day in row[0] for day in answer)
            else:
                assert of_then(row[0], answer) == of_then(answer, answer), statement
        connection.execute("select ensure_interactions_year(2031, 2032)")
        connection.rollback()
    assert schema(old) == schema(server)


def test_a_database_of_another_time_is_refused_with_the_way_out(database: str) -> None:
    with connect(database, autocommit=True) as connection:
        connection.execute("update alembic_version set version_num = '0020'")
    with pytest.raises(UserError, match=r"'0020'.*load your data into a new database"):
        migrations.upgrade(database)


def of_then(found: Any, answer: Any) -> Any:
    """Rows without the columns that came since, in one order; anything else as it is."""
    if not isinstance(answer, list) or not all(isinstance(row, dict) for row in [*answer, *found]):
        return found
    then = {name for row in answer for name in row}
    rows = [{name: value for name, value in row.items() if name in then} for row in found]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def schema(url: str) -> list[str]:
    """The DDL of our schemas, without the partitions that belong to the data."""
    arguments = ["--schema-only", "--schema=polytower", "--schema=feast", "--exclude-table=polytower.*_[gy][0-9]*", url]
    dumped = subprocess.run([programs() / "pg_dump", *arguments], check=True, capture_output=True, text=True).stdout
    # pg_dump guards each dump with a random word.
    lines = [line for line in dumped.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))]
    # A table that is newer than the default privileges lists its grants in another order.
    return [
        *(line for line in lines if not line.startswith("GRANT")),
        *sorted(x for x in lines if x.startswith("GRANT")),
    ]

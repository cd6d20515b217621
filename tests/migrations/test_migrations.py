"""The DDL: up, down, up again; equal to the metadata; nothing lost on the way; one migrator at a time."""

import subprocess
import sys

import psycopg
import pytest
from alembic import command
from psycopg import sql

import migrations
from migrations.env_names import include_name
from migrations.install import newest
from polytower.postgres import connect


def test_metadata_and_database_agree(database: str) -> None:
    command.check(migrations.config(database))


def test_down_and_up_again(database: str) -> None:
    migrations.downgrade("base", database)
    with connect(database) as connection:
        left = connection.execute("select count(*) from pg_tables where schemaname = 'polytower'").fetchone()
        assert left == (1,)  # alembic's own
    migrations.upgrade(database)
    command.check(migrations.config(database))


def test_upgrading_a_filled_database_loses_nothing(database: str) -> None:
    with connect(database) as connection:
        connection.execute(
            "create table interactions_y2020 partition of interactions for values from ('2020-01-01') to ('2021-01-01')"
        )
        connection.execute("insert into items (item_id, title) values ('i', 'ü')")
        connection.execute("insert into interactions (user_id, item_id, occurred_at) values ('u', 'i', '2020-05-05Z')")
    migrations.downgrade("0060", database)
    migrations.upgrade(database)
    with connect(database) as connection:
        assert connection.execute("select title from items").fetchall() == [("ü",)]
        assert connection.execute("select count(*) from interactions").fetchone() == (1,)
    command.check(migrations.config(database))


def test_two_processes_that_start_at_once_migrate_one_after_the_other(database: str) -> None:
    migrations.downgrade("base", database)
    program = [sys.executable, "-c", "import sys, migrations; migrations.upgrade(sys.argv[1])", database]
    processes = [subprocess.Popen(program) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    command.check(migrations.config(database))


def test_every_table_tells_what_it_is_for(connection: psycopg.Connection) -> None:
    silent = connection.execute(
        """select relname from pg_class where relnamespace = 'polytower'::regnamespace and relkind in ('r', 'p')
           and relname <> 'alembic_version' and obj_description(oid, 'pg_class') is null"""
    ).fetchall()
    assert not silent
    columns = connection.execute(
        """select attrelid::regclass::text, attname from pg_attribute join pg_class on pg_class.oid = attrelid
           where relnamespace = 'polytower'::regnamespace and relkind in ('r', 'p') and attnum > 0 and not attisdropped
           and relname <> 'alembic_version' and col_description(attrelid, attnum) is null"""
    ).fetchall()
    assert not columns
    told = connection.execute("select col_description('items'::regclass, attnum) from pg_attribute"
                              " where attrelid = 'items'::regclass and attname = 'available'").fetchone()  # fmt: skip
    assert told == ("Items that are not available are not recommended.",)


def test_every_function_tells_what_it_does_and_only_roles_of_ours_may_call_it(connection: psycopg.Connection) -> None:
    found = connection.execute(
        """select proname, obj_description(oid, 'pg_proc'), has_function_privilege('public', oid, 'execute'),
                  has_function_privilege('polytower_server', oid, 'execute')
           from pg_proc where pronamespace = 'polytower'::regnamespace"""
    ).fetchall()
    assert {row[0] for row in found} == newest().keys()
    assert not [row for row in found if not row[1] or row[2] or not row[3]]


def test_only_one_generation_is_live(connection: psycopg.Connection) -> None:
    connection.execute("insert into generations (dim, interests, state) values (4, 1, 'live')")
    with pytest.raises(psycopg.errors.UniqueViolation):
        connection.execute("insert into generations (dim, interests, state) values (4, 1, 'live')")


def test_two_generations_were_never_live_at_the_same_time(connection: psycopg.Connection) -> None:
    connection.execute("insert into generations (dim, interests) values (4, 1)")
    connection.execute(
        "insert into promotions (generation, live_from, live_until) values (1, '2020-01-01', '2020-02-01')"
    )
    connection.execute("insert into promotions (generation, live_from) values (1, '2020-02-01')")
    with pytest.raises(psycopg.errors.ExclusionViolation):
        connection.execute(
            "insert into promotions (generation, live_from, live_until) values (1, '2020-01-15', '2020-01-16')"
        )


def test_analysts_read_and_do_not_write(connection: psycopg.Connection) -> None:
    connection.execute("set role polytower_reader")
    assert connection.execute("select count(*) from items").fetchone() == (0,)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("insert into items (item_id) values ('x')")


def test_the_servers_role_takes_events_and_changes_nothing_else(database: str) -> None:
    with connect(database, autocommit=True) as connection:
        connection.execute("insert into items (item_id) values ('i')")
        connection.execute("set role polytower_server")
        connection.execute("select ensure_interactions_year(2031)")
        connection.execute("insert into interactions (user_id, item_id, occurred_at) values ('u', 'i', '2031-05-05Z')")
        assert connection.execute("select count(*) from changed_days").fetchone() == (1,)
        connection.execute("update api_keys set last_used_at = now()")
        for refused in (
            "create table mine (x int)", "create table polytower.mine (x int)", "delete from interactions",
            "update items set title = 'x'", "update api_keys set scopes = '{admin}'", "drop table interactions_y2031",
            "insert into generations (dim, interests) values (4, 1)", "delete from api_keys",
        ):  # fmt: skip
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(refused)
        connection.execute("reset role")
        connection.execute("set role polytower_reader")
        for refused in ("select ensure_interactions_year(2032)", "select * from api_keys"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(refused)


@pytest.mark.parametrize(
    ("name", "kept"), [("items", True), ("item_embeddings_g12", False), ("interactions_y1997", False)]
)
def test_run_time_partitions_are_left_to_the_data(name: str, kept: bool) -> None:
    assert include_name(name, "table", {}) is kept


def test_every_table_name_of_the_schema_exists(connection: psycopg.Connection) -> None:
    from feature_repo import schema

    names = [schema.INTERACTIONS, schema.ITEMS, schema.USERS, schema.CONTENT_ENCODERS, schema.GENERATIONS]
    for name in names:
        connection.execute(sql.SQL("select 1 from {} limit 0").format(sql.Identifier(schema.SCHEMA, name)))

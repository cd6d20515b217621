"""Locks: who waits for whom, who is told, and what is left of a killed holder."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from polytower import locks
from polytower.errors import UserError
from polytower.locks import held, holder, wait_in_transaction
from polytower.postgres import connect

ROOT = Path(__file__).parents[2]
Connection = psycopg.Connection[Any]
NAME = "polytower.test"


@pytest.fixture
def other(database: str) -> Iterator[Connection]:
    with connect(database) as opened:
        yield opened


def _setting(connection: Connection, name: str) -> Any:
    row = connection.execute("select current_setting(%s)", [name]).fetchone()
    return row and row[0]


def test_one_holds_it_and_others_do_not_matter(connection: Connection, other: Connection) -> None:
    with held(connection, NAME), held(other, "polytower.another"):
        found = holder(other, NAME)
        assert found is not None
        assert found.pid == connection.info.backend_pid
        assert found.application.startswith(NAME + ", process ")
    assert holder(other, NAME) is None
    assert _setting(connection, "application_name") == "polytower"


def test_whoever_waits_is_told_who_holds_it(
    connection: Connection, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "NAMED_AFTER", 0.1)
    other.execute("set lock_timeout = '77s'")
    told: list[str] = []
    twice = threading.Event()

    def tell(message: str) -> None:
        told.append(message)
        if len(told) == 2:
            twice.set()

    def wait() -> str:
        with held(other, NAME, told=tell):
            return str(_setting(other, "lock_timeout"))

    with ThreadPoolExecutor(1) as thread:
        with held(connection, NAME):
            waiting = thread.submit(wait)
            assert twice.wait(60)
            assert not waiting.done()
        assert waiting.result(60) == "77s"
    assert f"Postgres process {connection.info.backend_pid}, connected since" in told[0]
    assert "--take-over" in told[0]


def test_where_nobody_waits_the_holder_is_named_in_the_refusal(connection: Connection, other: Connection) -> None:
    named = f"process {connection.info.backend_pid}, connected since .* --take-over"
    with held(connection, NAME), pytest.raises(UserError, match=named), held(other, NAME, refuse_after=0.1):
        pass
    assert other.execute("select 1").fetchone() == (1,)


def test_taking_over_ends_the_holders_session(database: str, other: Connection) -> None:
    told: list[str] = []
    with psycopg.connect(database) as first:
        first.execute("select pg_advisory_lock(hashtextextended(%s, 0))", [NAME])
        first.commit()
        with held(other, NAME, take_over=True, told=told.append), pytest.raises(psycopg.OperationalError):
            first.execute("select 1")
    (message,) = told
    assert f"took {NAME} over from" in message


def test_whoever_was_taken_over_is_told(database: str, other: Connection) -> None:
    with (
        pytest.raises(UserError, match=f"{NAME} was taken over by another run"),
        connect(database) as first,
        held(first, NAME),
        held(other, NAME, take_over=True, told=lambda _: None),
    ):
        first.execute("select 1")


def test_without_the_privilege_nobody_is_ended(database: str, connection: Connection, other: Connection) -> None:
    role = f"weak_{connection.info.backend_pid}"
    connection.execute(psycopg.sql.SQL("create role {}").format(psycopg.sql.Identifier(role)))
    connection.commit()
    try:
        with held(connection, NAME):
            other.execute(psycopg.sql.SQL("set role {}").format(psycopg.sql.Identifier(role)))
            with pytest.raises(UserError, match="may not end"), held(other, NAME, take_over=True):
                pass
    finally:
        other.execute("reset role")
        other.commit()
        connection.execute(psycopg.sql.SQL("drop role {}").format(psycopg.sql.Identifier(role)))


def test_a_killed_holder_that_computes_loses_it(database: str, connection: Connection) -> None:
    """As a builder killed in the middle of an index: its statement would go on to its end."""
    code = (
        "import sys; from polytower.postgres import connect; from polytower.locks import held\n"
        "with connect(sys.argv[1]) as connection, held(connection, sys.argv[2]):\n"
        "    print('holding', flush=True); connection.execute('select pg_sleep(3600)')"
    )
    command = [sys.executable, "-c", code, database, NAME]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holding\n"
        process.kill()
    with held(connection, NAME, refuse_after=60):
        pass


def test_a_lock_of_the_transaction_keeps_what_was_done_before(
    connection: Connection, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "NAMED_AFTER", 0.1)
    told = threading.Event()

    def wait() -> None:
        other.execute("insert into users (user_id) values ('u')")
        wait_in_transaction(other, NAME, told=lambda _: told.set())

    with ThreadPoolExecutor(1) as thread:
        with held(connection, NAME):
            waiting = thread.submit(wait)
            assert told.wait(60)
        waiting.result(60)
    assert holder(connection, NAME) is not None
    assert _setting(other, "lock_timeout") == "0"
    other.commit()
    assert holder(connection, NAME) is None
    assert connection.execute("select user_id from users").fetchall() == [("u",)]


def test_a_folder_is_held_by_one_and_whoever_waits_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    heard, done = threading.Event(), threading.Event()

    def wait() -> None:
        with locks.folder(tmp_path, told=lambda message: (told.append(message), heard.set())):
            done.set()

    with locks.folder(tmp_path):
        waiting = threading.Thread(target=wait)
        waiting.start()
        heard.wait()
        assert not done.is_set()
    waiting.join()
    assert done.is_set()
    assert len(told) == 1
    assert told[0].startswith(f"waiting for {tmp_path}, held by process {os.getpid()} on ")
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o600


def test_a_killed_process_gives_its_folder_back(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from polytower import locks
with locks.folder(Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holding:
        assert holding.stdout is not None
        assert holding.stdout.readline() == "held\n"
        descriptor = os.open(tmp_path / ".lock", os.O_RDWR)
        assert not locks._locked(descriptor)
        assert f"process {holding.pid} on " in (tmp_path / ".lock").read_text()
        holding.kill()
        holding.wait()
        assert locks._locked(descriptor)
        os.close(descriptor)

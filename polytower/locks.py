"""Locks: who may load, encode, build, promote and migrate at a time, and whose turn it is meanwhile.

Those of a database are advisory locks. Such a lock belongs to a session, so it outlives commits and ends with its
connection. Postgres looks every few seconds whether the client of a holder is still there, and ends the session of a
killed one, whatever it is computing. A folder's lock belongs to a process, and the system ends it with the process.
"""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from polytower.errors import UserError

# The names of what is done by one at a time; encoding has one lock per modality, and each GPU its own.
BUILD = "polytower.build"
LOAD = "polytower.load"
MIGRATE = "polytower.migrate"
SEQUENCES = "polytower.sequences"

# Seconds of waiting after which the holder is named; and those that a lock which is not waited for may take to be
# free: a killed holder's session ends within CHECK.
NAMED_AFTER = 30.0
GRACE = 10.0
CHECK = "2s"
# Seconds between two attempts to get a folder's lock.
PAUSE = 0.2
WAY_OUT = "`polytower materialize --take-over` (or `load --take-over`, or take_over in Dagster) ends its session"

_KEY = sql.SQL("hashtextextended(%(name)s, 0)")
_RELEASE = sql.SQL("select pg_advisory_unlock({key})").format(key=_KEY)
# What takes a lock until the session ends or gives it back, and what until the transaction's end: at once, and waiting.
_SESSION, _TRANSACTION = (
    tuple(sql.SQL(statement).format(key=_KEY) for statement in pair)
    for pair in (
        ("select pg_try_advisory_lock({key})", "select pg_advisory_lock({key})"),
        ("select pg_try_advisory_xact_lock({key})", "select pg_advisory_xact_lock({key})"),
    )
)
_HOLDER = sql.SQL("""
    select a.pid, a.application_name, a.usename, a.client_addr::text, a.backend_start, a.state,
           left(regexp_replace(a.query, '\\s+', ' ', 'g'), 60),
           extract(epoch from clock_timestamp() - coalesce(a.query_start, a.backend_start))::float8
    from pg_locks l join pg_stat_activity a using (pid), (select {key} as key) k
    where l.locktype = 'advisory' and l.granted and l.objsubid = 1 and l.pid <> pg_backend_pid()
      and l.database = (select oid from pg_database where datname = current_database())
      and l.classid::bigint = (k.key >> 32) & 4294967295 and l.objid::bigint = k.key & 4294967295
    limit 1
""").format(key=_KEY)


@dataclass(frozen=True)
class Holder:
    """The session that holds a lock. since: connected. seconds: since its last statement began. None where hidden."""

    pid: int
    application: str
    user: str | None
    address: str | None
    since: datetime | None
    state: str | None
    query: str | None
    seconds: float | None

    def __str__(self) -> str:
        """For a person who waits for it."""
        where = f" from {self.address}" if self.address else ""
        who = f"{self.application or 'unnamed'} (user {self.user}{where}), Postgres process {self.pid}"
        if self.since is None:  # another user's session, which this one may not look into
            return who
        doing = f"{self.state}, last statement {self.seconds:.0f} s ago: {self.query}"
        return f"{who}, connected since {self.since:%Y-%m-%d %H:%M:%S %Z} ({doing})"


def holder(connection: psycopg.Connection[Any], name: str) -> Holder | None:
    """Who holds a lock, if anybody else does."""
    row = connection.execute(_HOLDER, {"name": name}).fetchone()
    return None if row is None else Holder(*row)


def tell(message: str) -> None:
    """To whoever watches the process: stderr, which Dagster keeps too."""
    sys.stderr.write(message + "\n")


@contextmanager
def held(
    connection: psycopg.Connection[Any],
    name: str,
    *,
    take_over: bool = False,
    refuse_after: float | None = None,
    told: Callable[[str], None] = tell,
) -> Iterator[None]:
    """Holds a lock for a block. Commits when it has the lock and on a clean exit, rolls back otherwise.

    Waits, and names the holder to `told` every NAMED_AFTER seconds. take_over: ends the holder's session, which gets a
    UserError. refuse_after: seconds after which UserError names the holder instead.
    """
    _introduce(connection, name, local=False)
    connection.commit()
    try:
        _acquire(connection, name, _SESSION, take_over=take_over, refuse_after=refuse_after, told=told)
        connection.commit()
        try:
            yield
        except psycopg.errors.AdminShutdown as error:
            raise UserError(
                f"{name} was taken over by another run (--take-over), or Postgres was stopped: this run has ended, and "
                "what it had committed is kept"
            ) from error
        except BaseException:
            if not connection.closed:
                connection.rollback()
            raise
        finally:
            if not connection.closed:
                connection.execute(_RELEASE, {"name": name})
                connection.commit()
    finally:
        if not connection.closed:
            connection.execute("reset application_name")
            connection.commit()


def wait_in_transaction(
    connection: psycopg.Connection[Any],
    name: str,
    *,
    take_over: bool = False,
    told: Callable[[str], None] = tell,
) -> None:
    """Takes a lock until the end of the transaction; waits and names the holder as held() does."""
    _introduce(connection, name, local=True)
    _acquire(connection, name, _TRANSACTION, take_over=take_over, refuse_after=None, told=told)


def _introduce(connection: psycopg.Connection[Any], name: str, *, local: bool) -> None:
    """What others see of this session; and Postgres ends it when its client is gone, whatever it is computing."""
    title = f"{name}, process {os.getpid()} on {socket.gethostname()}".encode()[:63].decode(errors="ignore")
    connection.execute("select set_config('application_name', %s, %s)", [title, local])
    with suppress(psycopg.errors.InvalidParameterValue), connection.transaction():  # a system that cannot tell
        connection.execute("select set_config('client_connection_check_interval', %s, false)", [CHECK])


def _acquire(
    connection: psycopg.Connection[Any],
    name: str,
    statements: tuple[sql.Composed, ...],
    *,
    take_over: bool,
    refuse_after: float | None,
    told: Callable[[str], None],
) -> None:
    attempt, wait = statements
    if connection.execute(attempt, {"name": name}).fetchone() == (True,):
        return
    if take_over:
        _end(connection, name, told)
    while True:
        patience = NAMED_AFTER if refuse_after is None else refuse_after
        if _waited(connection, name, wait, patience):
            return
        found = holder(connection, name)
        if refuse_after is not None:
            raise UserError(
                f"{name} is held by {found or 'another session'}. Wait until it has finished, or take over: {WAY_OUT}"
            )
        if found is not None:
            told(f"waiting for {name}, held by {found}. {WAY_OUT}")


def _waited(connection: psycopg.Connection[Any], name: str, wait: sql.Composed, seconds: float) -> bool:
    """Whether the lock came within so many seconds; what the transaction did before stays."""
    before = connection.execute("select current_setting('lock_timeout')").fetchone()
    timeout = "select set_config('lock_timeout', %s, true)"
    try:
        with connection.transaction():
            connection.execute(timeout, [f"{max(1, round(seconds * 1000))}ms"])
            connection.execute(wait, {"name": name})
            connection.execute(timeout, before)
    except psycopg.errors.LockNotAvailable:
        return False
    return True


def _end(connection: psycopg.Connection[Any], name: str, told: Callable[[str], None]) -> None:
    found = holder(connection, name)
    if found is None:
        return
    try:
        with connection.transaction():
            connection.execute("select pg_terminate_backend(%s)", [found.pid])
    except psycopg.errors.InsufficientPrivilege as error:
        raise UserError(
            f"{name} is held by {found}, which this database user may not end: ask user {found.user}, or an"
            f" administrator for `select pg_terminate_backend({found.pid})`"
        ) from error
    told(f"took {name} over from {found}, whose session was ended")


@contextmanager
def folder(path: Path, *, told: Callable[[str], None] = tell) -> Iterator[None]:
    """Holds the lock of an existing folder for a block; a process that is killed gives it back (flock).

    Waits, and names the holder to `told` at once and every NAMED_AFTER seconds.
    """
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+") as file:
        since = None
        while not _locked(descriptor):
            if since is None or time.monotonic() - since > NAMED_AFTER:
                since = time.monotonic()
                file.seek(0)
                told(f"waiting for {path}, held by {file.read() or 'another process'}")
            time.sleep(PAUSE)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

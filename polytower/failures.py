"""What the surroundings do to a command (a full disk, a closed folder, a Postgres that dies), in words."""

import errno
import sqlite3
from collections.abc import Iterator

import psycopg

from polytower.errors import UserError
from polytower.settings import settings

AGAIN = "finished work is kept, and the same command continues from there"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
# Postgres's class 08 and 57P: the connection, or the server, has gone.
_LOST = ("08", "57P")


def explained(error: BaseException) -> str | None:
    """One message for a UserError, or for a failure of the surroundings; None for what is our own fault."""
    for each in _chain(error):
        match each:
            case UserError():
                return str(each)
            case psycopg.Error():
                return _postgres(each)
            case sqlite3.DatabaseError():
                return _dagster(each)
            case OSError(errno=number) if number in _FULL:
                return f"no space left for {each.filename or settings().home}: free some; {AGAIN}"
            case OSError(errno=number, filename=str() as name) if number in _CLOSED:
                return f"{name} cannot be used: {each.strerror}; set POLYTOWER_HOME to a folder you own"
        # Libraries in Rust and C++ tell it in their own ways.
        if "No space left on device" in str(each):
            return f"no space left for {settings().home}: free some; {AGAIN}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what SQLAlchemy wraps in it, and what it was raised from."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        wrapped = getattr(each, "orig", None)
        each = wrapped if isinstance(wrapped, BaseException) else each.__cause__ or each.__context__


def _dagster(error: sqlite3.DatabaseError) -> str:
    # SQLite is Dagster's: its runs and events, nothing of the platform's own.
    folder = settings().home / "dagster"
    return (
        f"Dagster's files in {folder} cannot be used: {error}; check free space and permissions, or move {folder}"
        " away: it only holds the history of runs, no data, and is created again"
    )


def _postgres(error: psycopg.Error) -> str | None:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, psycopg.errors.DiskFull):
        return f"Postgres has no space left: {said}; free some on its disk; {AGAIN}"
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return f"the database role may not do this: {said}; `polytower init` grants what is needed (docs/postgres.md)"
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return f"Postgres accepts no changes here (a standby?): {said}"
    lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    if lost and (error.sqlstate is None or error.sqlstate.startswith(_LOST)):
        return f"the connection to Postgres was lost: {said}; {AGAIN}"
    return None

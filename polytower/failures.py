"""What the surroundings do to a command (a full disk, a closed folder, a Postgres that dies), in words."""

import errno
import sqlite3
from collections.abc import Iterator

import psycopg

from polytower.errors import UserError
from polytower.settings import settings

AGAIN = "what was finished is kept, and the same command goes on from there"
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
            case sqlite3.OperationalError():
                return f"Dagster's history in {settings().home / 'dagster'} cannot be written: {each}; {AGAIN}"
            case OSError(errno=errno.ENOSPC) | OSError(errno=errno.EDQUOT) | OSError(errno=errno.EFBIG):
                return f"no space is left for {each.filename or settings().home}: free some; {AGAIN}"
            case OSError(errno=errno.EROFS) | OSError(errno=errno.EACCES) | OSError(errno=errno.EPERM):
                return f"{each.filename or settings().home} cannot be written: set POLYTOWER_HOME to a folder that can"
        # Libraries in Rust and C++ tell it in their own ways.
        if "No space left on device" in str(each):
            return f"no space is left for {settings().home}: free some; {AGAIN}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _postgres(error: psycopg.Error) -> str | None:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, psycopg.errors.DiskFull):
        return f"Postgres has no space left: {said}; free some there; {AGAIN}"
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return f"the database role may not do this: {said}; `polytower init` grants (docs/postgres.md)"
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return f"Postgres takes no changes here (a standby?): {said}"
    lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    if lost and (error.sqlstate is None or error.sqlstate.startswith(_LOST)):
        return f"the connection to Postgres was lost: {said}; {AGAIN}"
    return None

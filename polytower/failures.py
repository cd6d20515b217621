"""What its surroundings do to a command (a full disk, a database that goes away), as words for a user."""

import errno
import sqlite3
from collections.abc import Iterator

from polytower.errors import UserError

_AGAIN = "run the same command again: what was finished is kept"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def as_user_error(error: BaseException) -> UserError | None:
    """The same as a message, where the surroundings are the reason; None where the program is."""
    for each in _causes(error):
        match each:
            case UserError():
                return each
            case OSError():
                text = _of_files(each)
            case sqlite3.DatabaseError():
                text = _of_dagster(each)
            case _:
                text = _of_postgres(each)
        if text:
            return UserError(text)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and what SQLAlchemy wraps."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        yield error
        inner = getattr(error, "orig", None) or error.__cause__
        if isinstance(inner, BaseException):
            error = inner


def _of_files(error: OSError) -> str:
    where = error.filename or "a file"
    if error.errno in _FULL:
        return f"{where} cannot be written: {error.strerror}; free some space, and {_AGAIN}"
    if error.errno in _CLOSED and error.filename:
        return (
            f"{where} cannot be read or written: {error.strerror}; change its owner or mode, or set POLYTOWER_HOME to"
            " a folder that is yours"
        )
    return ""


def _of_dagster(error: sqlite3.DatabaseError) -> str:
    """SQLite is Dagster's: its runs and events, nothing of the platform's own."""
    from polytower.settings import settings

    folder = settings().home / "dagster"
    return (
        f"Dagster's files in {folder} cannot be used: {error}; see that there is space and that they may be written,"
        f" or move {folder} away: it holds the history of runs, no data, and is made anew"
    )


def _of_postgres(error: BaseException) -> str:
    import psycopg

    if not isinstance(error, psycopg.OperationalError):
        return ""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    state = error.sqlstate or ""
    if isinstance(error, psycopg.errors.DiskFull):
        return f"the database's disk is full ({reason}); free some space, and {_AGAIN}"
    if not state or state.startswith(("08", "57P")):
        return f"the connection to the database was lost ({reason}); {_AGAIN}"
    return ""

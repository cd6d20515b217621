"""The one way to connect, to the embedded Postgres (embedded.py) or to the one that POLYTOWER_DATABASE_URL names.

Nothing is asked of the start-up packet but the application's name: poolers refuse the rest. What a session needs (names
resolve in the platform's schema first, wherever pgvector lives) is said by its first statement.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg

from polytower.cluster import programs
from polytower.embedded import DATABASE, EmbeddedPostgres, held
from polytower.errors import UserError
from polytower.settings import Settings, settings
from polytower.url import normalised, parts, shown

__all__ = [
    "DATABASE", "OPTIONS", "SCHEMA", "EmbeddedPostgres", "connect", "database_url", "open_session",
    "open_session_async", "psql_program", "psql_service", "register_types", "server_url",
]  # fmt: skip

SCHEMA = "polytower"
OPTIONS: Mapping[str, Any] = {"application_name": "polytower"}
# Seconds to wait for a Postgres that starts or recovers.
PATIENCE = 30.0

_SESSION = """
select set_config('search_path', concat_ws(', ', %(schema)s::text, 'public', (
           select quote_ident(nspname) from pg_extension join pg_namespace n on n.oid = extnamespace
           where extname = 'vector' and nspname <> 'public')), false),
       set_config('statement_timeout', %(timeout)s::text, false),
       pg_backend_pid()
"""
# URLs whose pooler was found to lend whole sessions.
_SESSIONS: set[str] = set()


def database_url(config: Settings | None = None) -> str:
    """URL of the platform's database; starts the embedded server when no POLYTOWER_DATABASE_URL is set.

    The lease is held until this process exits.
    """
    config = config or settings()
    return config.database_url or held(config.postgres_dir).url


def server_url(config: Settings | None = None) -> str:
    """URL for the HTTP server: of a role with the rights it needs, where there is one, else the platform's own."""
    config = config or settings()
    if config.server_database_url:
        return config.server_database_url
    return config.database_url or held(config.postgres_dir).server_url


@contextmanager
def connect(
    url: str | None = None, *, autocommit: bool = False, schema: str = SCHEMA
) -> Iterator[psycopg.Connection[Any]]:
    """A connection with the platform's search path and vector types; commits on a clean exit, rolls back otherwise.

    Raises UserError when nothing answers at the URL, or a pooler that lends transactions only.
    """
    where = normalised(url or database_url())
    connection = _open(where)
    with connection:
        connection.autocommit = True
        backend = open_session(connection, schema)
        _refuse_lent_transactions(where, connection, backend)
        register_types(connection)
        connection.autocommit = autocommit
        yield connection


def open_session(connection: psycopg.Connection[Any], schema: str = SCHEMA, *, timeout: float = 0) -> int:
    """What every session begins with; answers the number of the process behind it. timeout: seconds per statement."""
    row = connection.execute(_SESSION, _parameters(schema, timeout)).fetchone()
    if not connection.autocommit:
        connection.commit()
    assert row is not None
    return int(row[-1])


async def open_session_async(connection: psycopg.AsyncConnection[Any], *, timeout: float = 0) -> None:
    """open_session for a connection in autocommit mode."""
    await connection.execute(_SESSION, _parameters(SCHEMA, timeout))


def register_types(connection: psycopg.Connection[Any]) -> None:
    """Registers vector and halfvec on the connection, once the first migration has brought the extension."""
    from pgvector.psycopg import register_vector

    if psycopg.types.TypeInfo.fetch(connection, "vector") is not None:
        register_vector(connection)
    if not connection.autocommit:
        connection.commit()


def psql_program() -> str:
    """The psql beside the embedded server, which fits its version; else the one on the PATH."""
    try:
        program = programs() / "psql"
    except UserError:
        return "psql"
    return str(program) if program.exists() else "psql"


def psql_service(url: str) -> str:
    """A libpq service file with one service, [polytower]: the URL, with the platform's search path.

    Behind a pooler, which would refuse that, psql begins with the role's own search path.
    """
    given = parts(url)
    with connect(url) as connection:
        row = connection.execute("select current_setting('search_path'), pg_backend_pid()").fetchone()
        assert row is not None
        if row[1] == connection.info.backend_pid:
            path = f"-c search_path={row[0].replace(' ', '')}"
            given["options"] = f"{path} {given['options']}" if "options" in given else path
    return "\n".join(["[polytower]", *(f"{name}={value}" for name, value in given.items()), ""])


def _open(url: str) -> psycopg.Connection[Any]:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return psycopg.connect(url, **OPTIONS)
        except psycopg.OperationalError as error:
            # "… is starting up", "… is in recovery mode", "… is shutting down"
            if "the database system is" not in str(error) or time.monotonic() > deadline:
                raise UserError(f"Postgres does not answer: {error}; `polytower doctor` checks the setup") from error
            time.sleep(0.1)


def _parameters(schema: str, timeout: float) -> dict[str, str]:
    return {"schema": schema, "timeout": str(int(timeout * 1000))}


def _refuse_lent_transactions(url: str, connection: psycopg.Connection[Any], backend: int) -> None:
    """A pooler tells a number of its own at the start. One that lends a process per transaction gives the process
    behind this idle session to the next one, too."""
    if url in _SESSIONS or backend == connection.info.backend_pid:
        return
    with _open(url) as other:
        other.autocommit = True
        theirs = open_session(other)
        again = open_session(connection)
    if theirs == backend or again != backend:
        raise UserError(
            f"the pooler at {shown(url)} pools transactions, but polytower needs sessions for its locks, prepared"
            " statements and temporary tables. Use the pooler's session mode (a port of its own, or"
            " pool_mode = session), or connect to Postgres directly"
        )
    _SESSIONS.add(url)

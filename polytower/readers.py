"""Logins for analysts: they read what the reader role reads, with limits, and write nothing."""

import secrets
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import sql

from feature_repo.schema import READER_ROLE
from polytower.errors import UserError
from polytower.url import parts

# Seconds that a statement may run, and connections at a time.
TIMEOUT, CONNECTIONS = 300, 10

_KNOWN = """
select rolcanlogin and pg_has_role(oid, %(reader)s, 'member') and not rolsuper and not rolcreaterole
from pg_roles where rolname = %(name)s
"""


@dataclass(frozen=True)
class Limits:
    """timeout: seconds that a statement may run, 0 for any time. connections: at a time."""

    timeout: int = TIMEOUT
    connections: int = CONNECTIONS


def create(connection: psycopg.Connection[Any], name: str, limits: Limits, *, renew: bool = False) -> str:
    """Makes the login, and answers its password, which is stored nowhere in plain text.

    renew: a login of that name is there, and gets a new password and these limits. connection: of who may create roles;
    its search path becomes the login's. Raises UserError.
    """
    known = _known(connection, name)
    if known and not renew:
        raise UserError(f"there is a login {name} already; add --renew for a new password, or --drop to remove it")
    if renew and not known:
        raise UserError(f"there is no login {name}: leave --renew out")
    password = secrets.token_urlsafe(24)
    role = sql.Identifier(name)
    row = connection.execute("select current_setting('search_path'), current_database()").fetchone()
    assert row is not None
    path = sql.SQL(", ").join(sql.Identifier(each.strip().strip('"')) for each in row[0].split(","))
    # Neither the server's log nor its list of activities shows the password.
    hashed = connection.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()
    statements = [
        sql.SQL("{verb} role {role} login password {hashed} connection limit {connections}").format(
            verb=sql.SQL("alter" if known else "create"),
            role=role,
            hashed=sql.Literal(hashed),
            connections=sql.Literal(limits.connections),
        ),
        sql.SQL("grant {} to {}").format(sql.Identifier(READER_ROLE), role),
        *(
            sql.SQL("alter role {} in database {} set {} = {}").format(
                role, sql.Identifier(row[1]), sql.Identifier(setting), value
            )
            for setting, value in (
                ("search_path", path),
                ("statement_timeout", sql.Literal(f"{limits.timeout}s")),
                ("default_transaction_read_only", sql.Literal("on")),
            )
        ),
    ]
    _run(connection, statements, f"create role {name} login in role {READER_ROLE};")
    return password


def drop(connection: psycopg.Connection[Any], name: str) -> None:
    """Removes the login; its sessions go on until they end. Raises UserError."""
    if not _known(connection, name):
        raise UserError(f"there is no login {name}")
    _run(connection, [sql.SQL("drop role {}").format(sql.Identifier(name))], f"drop role {name};")


def url_of(url: str, name: str, password: str) -> str:
    """The database's URL as that login has it; several hosts stand among the parameters."""
    given = {key: value for key, value in parts(url).items() if key not in ("user", "password", "passfile")}
    database = quote(given.pop("dbname", ""), safe="")
    place = ""
    if "," not in given.get("host", ",") and not given["host"].startswith("/"):
        port = given.pop("port", "")
        place = given.pop("host") + (f":{port}" if port else "")
    query = "&".join(f"{key}={quote(value, safe='')}" for key, value in given.items())
    return f"postgresql://{quote(name, safe='')}:{password}@{place}/{database}{'?' + query if query else ''}"


def _known(connection: psycopg.Connection[Any], name: str) -> bool:
    """Whether there is such a login. Raises UserError for a role that is another thing."""
    if not name or len(name.encode()) > 63:
        raise UserError("the name of a login has from 1 to 63 bytes")
    if connection.execute("select 1 from pg_roles where rolname = %s", [READER_ROLE]).fetchone() is None:
        raise UserError(
            f"the role {READER_ROLE} is missing: have an administrator run `create role {READER_ROLE} nologin;`, then"
            " run `polytower init`"
        )
    row = connection.execute(_KNOWN, {"name": name, "reader": READER_ROLE}).fetchone()
    if row is not None and not row[0]:
        raise UserError(f"the role {name} is no reader's login; take another name")
    return row is not None


def _run(connection: psycopg.Connection[Any], statements: list[sql.Composed], alone: str) -> None:
    try:
        for statement in statements:
            connection.execute(statement)
    except psycopg.errors.InsufficientPrivilege as error:
        raise UserError(
            f"this role may not manage logins: have an administrator run `{alone}` (docs/postgres.md)"
        ) from error
    connection.commit()

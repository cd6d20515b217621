"""What a migration needs of the database beside its tables: the extension, two schemas, two roles.

Each is made where the connecting role may, and found where an administrator has made it. Without the roles everything
works but granting to them; without the rest, UserError says which statement an administrator has to run.
"""

import logging
from typing import Any

from psycopg import errors
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError

from feature_repo.schema import FEAST_SCHEMA, READER_ROLE, SCHEMA, SERVER_ROLE
from polytower.errors import UserError

LOG = logging.getLogger(__name__)
ROLES = (READER_ROLE, SERVER_ROLE)
_PINNED = f"search_path = {SCHEMA}, public"

# Run after every upgrade, by the owner of the schemas; nothing is lost by running it twice.
_READER = """
grant usage on schema polytower, feast to polytower_reader;
grant select on all tables in schema polytower, feast to polytower_reader;
alter default privileges in schema polytower grant select on tables to polytower_reader;
grant execute on all functions in schema polytower, feast to polytower_reader;
revoke all on api_keys from polytower_reader;
revoke all on function ensure_interactions_year(integer[]) from polytower_reader;
"""
# The HTTP server reads what analysts read, takes interactions and notes when a key was used.
_SERVER = """
grant usage on schema polytower, feast to polytower_server;
grant select on all tables in schema polytower, feast to polytower_server;
alter default privileges in schema polytower grant select on tables to polytower_server;
grant execute on all functions in schema polytower, feast to polytower_server;
grant insert on interactions, changed_days to polytower_server;
grant usage on sequence interaction_position to polytower_server;
grant update (last_used_at) on api_keys to polytower_server;
"""


def prepare(connection: Connection) -> None:
    """Sees to the extension, the schemas and the roles, and to where functions look names up."""
    _ensure_extension(connection)
    for schema in (SCHEMA, FEAST_SCHEMA):
        _ensure_schema(connection, schema)
    missing = [role for role in ROLES if not _ensure_role(connection, role)]
    if missing:
        LOG.warning(
            "the role %s may not create roles: done without %s. Later, an administrator may run `create role …;` for"
            " them, and you `polytower init` (docs/postgres.md)", _user(connection), " and ".join(missing),
        )  # fmt: skip
    extension = _scalar(
        connection,
        "select quote_ident(nspname) from pg_extension join pg_namespace n on n.oid = extnamespace"
        " where extname = 'vector'",
    )
    path = f"{SCHEMA}, public" if extension == "public" else f"{SCHEMA}, public, {extension}"
    connection.execute(text(f"set search_path = {path}"))
    event.listen(connection, "before_cursor_execute", _pinned_to(path), retval=True)
    connection.commit()


def grant(connection: Connection) -> None:
    """Grants the rights of the two roles, as far as they are there."""
    for role, statements in ((READER_ROLE, _READER), (SERVER_ROLE, _SERVER)):
        if _exists(connection, role):
            connection.execute(text(statements))


def _pinned_to(path: str) -> Any:
    """Functions pin the path of names: here as this database has its schemas."""

    def rewrite(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return statement.replace(_PINNED, f"search_path = {path}"), parameters

    return rewrite


def _ensure_extension(connection: Connection) -> None:
    if _scalar(connection, "select 1 from pg_extension where extname = 'vector'"):
        return
    try:
        connection.execute(text("create extension vector with schema public"))
    except DBAPIError as error:
        connection.rollback()
        if isinstance(error.orig, errors.InsufficientPrivilege):
            raise UserError(
                f"the role {_user(connection)} may not create the extension pgvector in database"
                f" {_database(connection)}: have an administrator run `create extension vector;` there"
            ) from error
        if isinstance(error.orig, errors.UndefinedFile | errors.FeatureNotSupported):
            raise UserError(
                "pgvector is not installed on the Postgres server: install version 0.8.4 or newer there"
            ) from error
        raise


def _ensure_schema(connection: Connection, schema: str) -> None:
    may = _scalar(connection, "select has_schema_privilege(to_regnamespace(:name)::oid, 'create')", name=schema)
    if may:
        return
    try:
        if may is not None:
            raise PermissionError
        connection.execute(text(f"create schema {schema}"))
    except (DBAPIError, PermissionError) as error:
        connection.rollback()
        if isinstance(error, DBAPIError) and not isinstance(error.orig, errors.InsufficientPrivilege):
            raise
        user, statement = _user(connection), "create" if may is None else "alter"
        middle = "authorization" if may is None else "owner to"
        raise UserError(
            f"the role {user} may not create schemas in database {_database(connection)}, nor tables in all of ours:"
            f" have an administrator run `{statement} schema {schema} {middle} {user};` there"
        ) from error


def _ensure_role(connection: Connection, role: str) -> bool:
    if _exists(connection, role):
        return True
    try:
        with connection.begin_nested():
            connection.execute(text(f"create role {role} nologin"))
    except DBAPIError as error:
        # Roles are the server's: another database's migration may have made it just now.
        if isinstance(error.orig, errors.UniqueViolation | errors.DuplicateObject):
            return True
        if not isinstance(error.orig, errors.InsufficientPrivilege):
            raise
        return False
    return True


def _exists(connection: Connection, role: str) -> bool:
    return bool(_scalar(connection, "select 1 from pg_roles where rolname = :role", role=role))


def _user(connection: Connection) -> str:
    return str(_scalar(connection, "select quote_ident(current_user)"))


def _database(connection: Connection) -> str:
    return str(_scalar(connection, "select quote_ident(current_database())"))


def _scalar(connection: Connection, query: str, **parameters: Any) -> Any:
    return connection.execute(text(query), parameters).scalar()

"""`polytower doctor`: looks at everything the platform leans on and says how to get what is missing."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from feature_repo.modalities import MODALITIES
from feature_repo.schema import READER_ROLE, SERVER_ROLE
from polytower.errors import UserError
from polytower.machine import cpus, memory_bytes
from polytower.settings import Settings, settings

MINIMUM_POSTGRES = 160000
# Below 0.8.4 an HNSW index can be corrupted by a concurrent vacuum.
MINIMUM_PGVECTOR = (0, 8, 4)
FREE_SPACE_GIB = 2.0
PACKAGES = ("dagster", "feast", "great_expectations", "torch", "transformers", "pgvector", "sqlalchemy", "psycopg")


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `detail` is what was found, `remedy` the way out when it is not ok."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Runs every check; none of them changes anything but starting the embedded server."""
    config = settings()
    findings = [_python(), _packages(), _machine(), _disk(config)]
    for check in (_database, _device, _weights):
        findings += _guarded(check, config)
    return findings


def _guarded(check: Callable[[Settings], list[Finding]], config: Settings) -> list[Finding]:
    try:
        return check(config)
    except (UserError, OSError, RuntimeError) as error:
        return [Finding(check.__name__.strip("_"), False, str(error).splitlines()[0], "see the message")]


def _python() -> Finding:
    version = sys.version_info
    ok = version[:2] == (3, 11)
    return Finding("python", ok, ".".join(map(str, version[:3])), "install Python 3.11, which polytower is tested on")


def _packages() -> Finding:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return Finding("packages", False, f"missing: {', '.join(missing)}", "run `make install`")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("dagster", "feast", "torch", "transformers"))
    return Finding("packages", True, ", ".join(versions))


def _machine() -> Finding:
    return Finding("machine", True, f"{memory_bytes() / 2**30:.1f} GiB of memory, {cpus()} CPUs")


def _disk(config: Settings) -> Finding:
    folder = next(parent for parent in (config.home, *config.home.parents) if parent.exists())
    free = shutil.disk_usage(folder).free / 2**30
    ok = free > FREE_SPACE_GIB and os.access(folder, os.W_OK)
    return Finding(
        "disk", ok, f"{free:.0f} GiB free at {config.home}", "free some space, or set POLYTOWER_HOME to another disk"
    )


def _database(config: Settings) -> list[Finding]:
    import migrations
    from polytower.postgres import connect

    kind = "POLYTOWER_DATABASE_URL" if config.database_url else "embedded"
    with connect() as connection:
        version, name = _row(connection, "select current_setting('server_version_num')::int, version()")
        found = [
            Finding(
                "postgres", version >= MINIMUM_POSTGRES, f"{kind}: {name.split(' on ')[0]}", "use Postgres 16 or newer"
            )
        ]
        extension = connection.execute(
            """select default_version, installed_version from pg_available_extensions where name = 'vector'"""
        ).fetchone()
        found.append(_pgvector(extension))
        found += [_schema(connection, migrations.head()), _rights(connection), _roles(connection, config)]
    return found


def _row(connection: Any, query: str) -> tuple[Any, ...]:
    row = connection.execute(query).fetchone()
    assert row is not None
    return tuple(row)


def _pgvector(extension: tuple[str, str | None] | None) -> Finding:
    if extension is None:
        return Finding("pgvector", False, "not available", "install pgvector 0.8.4 or newer on the Postgres server")
    version = extension[1] or extension[0]
    ok = tuple(map(int, version.split("."))) >= MINIMUM_PGVECTOR
    remedy = "install pgvector 0.8.4 or newer, then `alter extension vector update`"
    return Finding("pgvector", ok, f"{version}{'' if extension[1] else ' (created by `polytower init`)'}", remedy)


def _schema(connection: Any, head: str) -> Finding:
    table = _row(connection, "select to_regclass('polytower.alembic_version')")[0]
    revision = _row(connection, "select version_num from polytower.alembic_version")[0] if table else "none"
    return Finding("schema", revision == head, f"revision {revision}, newest {head}", "run `polytower init`")


def _rights(connection: Any) -> Finding:
    """A generation and a year of interactions are partitions of their own: whoever makes them owns the schema."""
    user, created, may = _row(
        connection,
        """select quote_ident(current_user), to_regnamespace('polytower') is not null,
                  coalesce(has_schema_privilege(to_regnamespace('polytower')::oid, 'create'),
                           has_database_privilege(current_database(), 'create'))
                  and has_database_privilege(current_database(), 'temporary')""",
    )
    change = f"alter schema polytower owner to {user};" if created else f"create schema polytower authorization {user};"
    remedy = f"have an administrator run `{change}` (docs/postgres.md lists what is needed)"
    return Finding(
        "rights", may, f"{user} {'may' if may else 'may not'} create partitions and temporary tables", remedy
    )


def _roles(connection: Any, config: Settings) -> Finding:
    """Not having them is no fault: then there is one role for all."""
    roles = (READER_ROLE, SERVER_ROLE)
    there = connection.execute("select rolname from pg_roles where rolname = any (%s)", [[*roles]]).fetchall()
    missing = [role for role in roles if (role,) not in there]
    alone = bool(config.database_url and not config.server_database_url)
    detail = f"working without: {', '.join(missing)}" if missing else ", ".join(roles)
    return Finding("roles", True, detail + ("; `serve` connects as the owner (docs/postgres.md)" if alone else ""))


def _device(config: Settings) -> list[Finding]:
    from encoders.device import resolve_device

    return [Finding("device", True, f"{config.device} -> {resolve_device(config.device)}")]


def _weights(_config: Settings) -> list[Finding]:
    bundled = [record for record in MODALITIES.values() if record.package]
    missing = [one for one in bundled if importlib.util.find_spec(str(one.package)) is None]
    names = " and ".join(record.name for record in bundled)
    detail = f"missing: {', '.join(str(one.package) for one in missing)}" if missing else f"bundled {names} encoders"
    variables = ", ".join(str(one.variable) for one in missing)
    return [Finding("weights", not missing, detail, f"run `make install`, or name others in {variables}")]

"""The one truth of the DDL, and the two calls that apply it."""

from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from feature_repo.schema import READER_ROLE, SERVER_ROLE
from migrations import content_views
from polytower.errors import UserError
from polytower.postgres import connect


def config(url: str | None = None) -> Config:
    """Alembic's configuration; url None means the platform's database."""
    settings = Config(str(Path(__file__).parent / "alembic.ini"))
    settings.attributes["url"] = url
    return settings


def upgrade(url: str | None = None, revision: str = "head") -> None:
    """Brings the database to the revision; running it twice changes nothing, and needs no rights the second time.

    Raises UserError naming what the role in the URL may not do.
    """
    if revision == "head" and _complete(url):
        return
    try:
        command.upgrade(config(url), revision)
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            first = str(error.orig).splitlines()[0]
            raise UserError(
                f"the database cannot be upgraded: {first}; docs/postgres.md lists what is needed"
            ) from error
        raise
    except CommandError as error:
        raise UserError(
            f"the database cannot be upgraded: {error}. Another version of polytower made it: use a newer one of this"
            " program, or load your data into a new database"
        ) from error


def _complete(url: str | None) -> bool:
    """Whether the database is at the newest revision, and all roles that are there have their rights."""
    with connect(url) as connection:
        if not connection.execute("select to_regclass('polytower.alembic_version') is not null").fetchone()[0]:  # type: ignore[index]
            return False
        row = connection.execute(
            """select version_num, (select bool_and(has_schema_privilege(oid, 'polytower', 'usage'))
                                    from pg_roles where rolname = any (%s))
               from polytower.alembic_version""",
            [[READER_ROLE, SERVER_ROLE]],
        ).fetchone()
        columns = [name for (name,) in connection.execute(content_views.COLUMNS)]
    return row is not None and row[0] == head() and row[1] is not False and not content_views.missing(columns)


def downgrade(revision: str, url: str | None = None) -> None:
    """Takes the database back to the revision ("base" empties it)."""
    command.downgrade(config(url), revision)


def head() -> str:
    """The newest revision that this code brings."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None
    return revision

"""The one truth of the DDL, and the two calls that apply it."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory


def config(url: str | None = None) -> Config:
    """Alembic's configuration; url None means the platform's database."""
    settings = Config(str(Path(__file__).parent / "alembic.ini"))
    settings.attributes["url"] = url
    return settings


def upgrade(url: str | None = None, revision: str = "head") -> None:
    """Brings the database to the revision; running it twice changes nothing."""
    command.upgrade(config(url), revision)


def downgrade(revision: str, url: str | None = None) -> None:
    """Takes the database back to the revision ("base" empties it)."""
    command.downgrade(config(url), revision)


def head() -> str:
    """The newest revision that this code brings."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None
    return revision

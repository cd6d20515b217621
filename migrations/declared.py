"""What the tables of tables.py and code_tables.py are declared with: their metadata, and columns that come often."""

from typing import Any

from sqlalchemy import BigInteger, Column, DateTime, MetaData, Text, text
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData()

TIME = DateTime(timezone=True)
NOW = text("now()")
EMPTY = text("'{}'::jsonb")
ENCODER = ["content_encoders.modality", "content_encoders.revision"]


def words(name: str, **options: Any) -> Column[str]:
    """A text that is never null."""
    return Column(name, Text, nullable=False, **options)


def json(name: str, **options: Any) -> Column[Any]:
    """A JSON value, an empty object by default."""
    return Column(name, JSONB, nullable=False, server_default=EMPTY, **options)


def time(name: str, **options: Any) -> Column[Any]:
    """A moment, never null."""
    return Column(name, TIME, nullable=False, **options)


def identity(name: str) -> Column[int]:
    """A number that the database draws: the key."""
    return Column(name, BigInteger, primary_key=True)

"""What a load leaves out because it was forgotten (pipelines/forget.py)."""

from typing import Any

import psycopg
from psycopg import sql

ANYBODY = "select exists (select from forgotten)"
# A user's new events are taken: somebody who was forgotten may come back. An item's are not.
INTERACTIONS = """
delete from staged_interactions s using forgotten f
where f.entity = 'item' and f.digest = sha256(convert_to(s.item_id, 'UTF8'))
   or f.entity = 'user' and f.digest = sha256(convert_to(s.user_id, 'UTF8')) and s.occurred_at <= f.forgotten_at
"""
ENTITIES = """
delete from {staged} s using forgotten f
where f.entity = {entity} and f.digest = sha256(convert_to(s.{key}, 'UTF8'))
"""


def leave_out_events(connection: psycopg.Connection[Any]) -> int:
    """Removes the staged events of the forgotten; answers how many."""
    return connection.execute(INTERACTIONS).rowcount if _anybody(connection) else 0


def leave_out(connection: psycopg.Connection[Any], table: str, key: str) -> int:
    """Removes the staged items or users that are forgotten; answers how many."""
    if not _anybody(connection):
        return 0
    statement = sql.SQL(ENTITIES).format(
        staged=sql.Identifier(f"staged_{table}"),
        entity=sql.Literal(table.removesuffix("s")),
        key=sql.Identifier(key),
    )
    return connection.execute(statement).rowcount


def _anybody(connection: psycopg.Connection[Any]) -> bool:
    """Whether there is anything to leave out: a load without it costs nothing."""
    row = connection.execute(ANYBODY).fetchone()
    assert row is not None
    return bool(row[0])

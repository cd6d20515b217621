"""The towers that travel with a generation, read back as a server reads them."""

from typing import TYPE_CHECKING, Any

import psycopg

from polytower.errors import UserError

if TYPE_CHECKING:
    from encoders.towers.content_tower import Content
    from encoders.towers.towers import UserTower

USER_TOWER, CONTENT_TOWER = "user_tower", "content"
PART = "select weights, config from towers where generation = %s and part = %s"


def stored_user_tower(connection: psycopg.Connection[Any], generation: int) -> "UserTower | None":
    """A generation's user tower; None where there is none, or none that can be read."""
    from encoders.training.checkpoint import load_user_tower

    row = connection.execute(PART, [generation, USER_TOWER]).fetchone()
    try:
        return None if row is None else load_user_tower(bytes(row[0]), row[1])
    except UserError:
        return None


def stored_content_tower(connection: psycopg.Connection[Any], generation: int) -> "Content | None":
    """A generation's content tower; None where there is none, or none that can be read."""
    from encoders.training.checkpoint import load_content_tower

    row = connection.execute(PART, [generation, CONTENT_TOWER]).fetchone()
    try:
        return None if row is None else load_content_tower(bytes(row[0]), row[1])
    except UserError:
        return None

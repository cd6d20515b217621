"""Tables and columns tell what they hold where an analyst meets them: psql's `\\d+`, any tool that reads comments."""

from sqlalchemy import Connection
from sqlalchemy.schema import SetColumnComment, SetTableComment

from migrations.tables import metadata


def write(connection: Connection) -> None:
    """Writes the words of tables.py into the database; run after every upgrade, nothing is lost by running it twice."""
    for table in metadata.tables.values():
        connection.execute(SetTableComment(table))
        for column in table.columns:
            if column.comment:
                connection.execute(SetColumnComment(column))

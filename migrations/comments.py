"""Tables and columns tell what they hold where an analyst meets them: psql's `\\d+`, any tool that reads comments."""

from psycopg import sql
from sqlalchemy import Connection
from sqlalchemy.schema import SetColumnComment, SetTableComment

from migrations.tables import metadata

VIEWS = {
    "live_generation": "The generation that answers: at most one row of `generations`.",
    "item_content": "One row per item: its content embeddings by the encoder revision in force for each modality.",
    "item_semantic_ids": "Semantic IDs of the set of codes in force, one row per item with content.",
}


def write(connection: Connection) -> None:
    """Writes the words of tables.py and of the views into the database; nothing is lost by running it twice."""
    for table in metadata.tables.values():
        connection.execute(SetTableComment(table))
        for column in table.columns:
            if column.comment:
                connection.execute(SetColumnComment(column))
    for name, words in VIEWS.items():
        statement = sql.SQL("comment on view {} is {}").format(sql.Identifier(name), words)
        connection.exec_driver_sql(statement.as_string())

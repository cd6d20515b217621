"""What the items have to encode, as SQL made of the records in feature_repo/modalities.py."""

from typing import Any

import psycopg
from psycopg import sql

from feature_repo.modalities import BLANK, MODALITIES, TEXT_SEPARATOR, modality
from feature_repo.schema import ITEMS, SCHEMA

_CONTENT = sql.SQL("""
    select item_id, content, {content_hash} as content_hash
    from (select *, {content} as content from {items}) as rendered
    where {has}
""")


def content_of(name: str) -> sql.Composed:
    """SQL of the items that have a modality: item_id, content, content_hash. Raises UserError for an unknown one."""
    record = modality(name)
    literals = {"separator": sql.Literal(TEXT_SEPARATOR), "blank": sql.Literal(BLANK)}
    content, content_hash, has = (
        sql.SQL(part).format(**literals) for part in (record.content_sql, record.hash_sql, record.has_sql)
    )
    return _CONTENT.format(content=content, content_hash=content_hash, has=has, items=sql.Identifier(SCHEMA, ITEMS))


def with_content() -> sql.Composed:
    """SQL of the ids of all items that have content of any modality."""
    each = (sql.SQL("select item_id from ({}) as c").format(content_of(name)) for name in MODALITIES)
    return sql.SQL(" union ").join(each)


def model_of(connection: psycopg.Connection[Any], name: str) -> str | None:
    """The encoder's model where the items name it, or else, when they lost the modality, the one in force."""
    column = modality(name).model_column
    if column is None:
        return None
    statement = sql.SQL(
        """select coalesce((select {column} from items where {column} is not null limit 1),
                           (select model from content_encoders where modality = %(modality)s and active))"""
    ).format(column=sql.Identifier(column))
    row = connection.execute(statement, {"modality": name}).fetchone()
    return row and row[0]

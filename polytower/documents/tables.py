"""docs/reference/tables.md: every table with its purpose, key and columns."""

from sqlalchemy import Column, Dialect, Table, make_url

from migrations.comments import VIEWS
from migrations.tables import metadata
from polytower.documents.markdown import bullets, paragraph

DIALECT: type[Dialect] = make_url("postgresql+psycopg://").get_dialect()

HEAD = """# Tables

Schema `polytower`. In psql, `\\d+ polytower.items` shows the same words.
"""


def page() -> str:
    """The page, from `migrations/tables.py`."""
    views = bullets((f"`{name}`", words) for name, words in VIEWS.items())
    return HEAD + "".join(_section(table) for table in metadata.tables.values()) + f"\n## Views\n\n{views}\n"


def _section(table: Table) -> str:
    key = ", ".join(f"`{column.name}`" for column in table.primary_key.columns)
    purpose = paragraph(f"{table.comment} {f'Key: {key}.' if key else 'No key.'}")
    columns = bullets((f"`{column.name}` ({_type(column)})", column.comment or "") for column in table.columns)
    return f"\n## {table.name}\n\n{purpose}\n\n{columns}\n"


def _type(column: Column[object]) -> str:
    kind = column.type.compile(dialect=DIALECT()).lower()
    return f"{kind}, may be null" if column.nullable else kind

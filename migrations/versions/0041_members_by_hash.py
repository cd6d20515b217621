"""Filtered retrieval looks its items up by hash: half the time of four thousand descents through a tree of texts.

Compatibility: nothing answers differently. Takes half a second for a generation of 200,000 items.
"""

from pathlib import Path

from alembic import op

revision = "0041"
down_revision = "0040"
branch_labels = None
depends_on = None

SQL = Path(__file__).parents[1] / "sql"


def upgrade() -> None:
    # Declared for the whole table: a partition that is attached without one gets it then.
    op.execute("create index item_embeddings_item_idx on item_embeddings using hash (item_id)")
    _replace(3)


def downgrade() -> None:
    _replace(2)
    op.execute("drop index item_embeddings_item_idx")


def _replace(version: int) -> None:
    """`create or replace` keeps who may call the function."""
    statement = (SQL / f"scanned_lists_v{version}.sql").read_text()
    op.get_bind().exec_driver_sql(statement.replace("create function", "create or replace function").replace("%", "%%"))

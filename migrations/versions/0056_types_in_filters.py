"""A filter that compares an attribute with a type that it never has is an error that names the type.

Compatibility: such a filter found nothing before, and said nothing.
"""

from pathlib import Path

from alembic import op

revision = "0056"
down_revision = "0054"
branch_labels = None
depends_on = None

SQL = Path(__file__).parents[1] / "sql"


def upgrade() -> None:
    _replace(2)


def downgrade() -> None:
    _replace(1)


def _replace(version: int) -> None:
    """`create or replace` keeps who may call the function."""
    statement = (SQL / f"raise_unknown_attribute_v{version}.sql").read_text()
    statement = statement.replace("create function", "create or replace function")
    op.get_bind().exec_driver_sql(statement.replace("%", "%%"))

"""The first events of a year may come from several senders at once, and of several years in any order.

Compatibility: older code calls the function with one year, which it goes on taking.
"""

from pathlib import Path

from alembic import op

revision = "0053"
down_revision = "0041"
branch_labels = None
depends_on = None

SQL = Path(__file__).parents[1] / "sql"


def upgrade() -> None:
    op.execute("drop function ensure_interactions_year(integer)")
    _create(2)


def downgrade() -> None:
    op.execute("drop function ensure_interactions_year(integer[])")
    _create(1)


def _create(version: int) -> None:
    statement = (SQL / f"ensure_interactions_year_v{version}.sql").read_text()
    op.get_bind().exec_driver_sql(statement.replace("%", "%%"))

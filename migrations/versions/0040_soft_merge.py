"""A merge "soft": the score that towers trained with `objective="soft_consistent"` were trained with.

Compatibility: nothing that worked before answers differently.
"""

from pathlib import Path

from alembic import op

revision = "0040"
down_revision = "0020"
branch_labels = None
depends_on = None

SQL = Path(__file__).parents[1] / "sql"


def upgrade() -> None:
    _replace(3)


def downgrade() -> None:
    _replace(2)


def _replace(version: int) -> None:
    """`create or replace` keeps who may call a function."""
    for name in ("check_question", "merge_lists"):
        statement = (
            (SQL / f"{name}_v{version}.sql").read_text().replace("create function", "create or replace function")
        )
        op.get_bind().exec_driver_sql(statement.replace("%", "%%"))

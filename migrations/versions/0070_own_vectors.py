"""The user's own embeddings of items: a vector, and the column and width that it came from.

Compatibility: two nullable columns that older code neither reads nor writes.
"""

from alembic import op

revision = "0070"
down_revision = "0062"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """alter table items add column vector real[], add column vector_model text,
               add constraint items_vector_model_check check ((vector is null) = (vector_model is null))"""
    )


def downgrade() -> None:
    op.execute("alter table items drop column vector, drop column vector_model")

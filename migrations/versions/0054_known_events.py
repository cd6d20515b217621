"""Interests say how many of their user's events they know: whatever arrives later is news, however it is dated.

A count, and not the highest position: positions are drawn before a transaction commits, so that a lower one may arrive
after a higher one.

Compatibility: older code leaves the column null, and then the newest event's time decides, as before.
"""

from alembic import op

revision = "0054"
down_revision = "0053"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("alter table user_interests add column events bigint")


def downgrade() -> None:
    op.execute("alter table user_interests drop column events")

"""A role of its own for the HTTP server, which makes a year's partition by a function and no other table.

Compatibility: the function does what it did, now with its owner's rights; only the owner and the server may call it.
privileges.py grants the rest.
"""

from alembic import op

revision = "0059"
down_revision = "0056"
branch_labels = None
depends_on = None

FUNCTION = "function ensure_interactions_year(integer[])"


def upgrade() -> None:
    op.execute(f"alter {FUNCTION} security definer")
    op.execute(f"revoke all on {FUNCTION} from public")


def downgrade() -> None:
    op.execute(f"grant execute on {FUNCTION} to public")
    op.execute(f"alter {FUNCTION} security invoker")

"""${message}

Compatibility: the code of the release before must go on working on this schema; say here why it does.
"""

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "raise AssertionError('write the upgrade')"}


def downgrade() -> None:
    ${downgrades if downgrades else "raise AssertionError('write the downgrade')"}

"""The moment from which on a generation knew no event, for training sets that must not know the future.

Compatibility: a nullable column that older code neither reads nor writes, at the end of the table and of its view, and
a function that it does not call.
"""

from alembic import op

from migrations.install import install

revision = "0076"
down_revision = "0073"
branch_labels = None
depends_on = None

LIVE = "create or replace view live_generation as select * from generations where state = 'live'"


def upgrade() -> None:
    op.execute("alter table generations add column trained_before timestamptz")
    op.execute(LIVE)
    install("trained_generation", 1)


def downgrade() -> None:
    op.execute("drop function trained_generation")
    op.execute("drop view live_generation")
    op.execute("alter table generations drop column trained_before")
    op.execute(LIVE)

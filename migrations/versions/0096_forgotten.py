"""Who was forgotten: what loads and posts leave out, so that a file of yesterday does not bring it back.

Compatibility: a table of its own; older code does not ask it, and would load the forgotten again.
"""

from alembic import op

revision = "0096"
down_revision = "0095"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """create table forgotten (
               entity text not null check (entity in ('user', 'item')),
               digest bytea not null,
               forgotten_at timestamptz not null default now(),
               constraint forgotten_pkey primary key (entity, digest)
           )"""
    )


def downgrade() -> None:
    op.execute("drop table forgotten")

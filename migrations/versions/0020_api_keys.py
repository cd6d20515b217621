"""API keys: who may ask the HTTP API, for what, and how often.

Compatibility: adds one table that older code does not look at.
"""

from alembic import op

revision = "0020"
down_revision = "0010"
branch_labels = None
depends_on = None

# A key is 256 random bits: nobody can guess one, so a plain SHA-256 hides it as well as a slow password hash would,
# and costs a request a microsecond. rate: requests per second, null without a limit; burst: how many at once.
TABLE = """
create table api_keys (
    key_id text primary key,
    name text not null,
    hash bytea not null,
    scopes text[] not null check (scopes <@ array['read', 'write', 'admin'] and scopes <> '{}'),
    rate double precision check (rate > 0),
    burst integer not null check (burst > 0),
    created_at timestamptz not null default now(),
    last_used_at timestamptz,
    revoked_at timestamptz
);
create unique index api_keys_hash_idx on api_keys (hash);
-- Analysts read every table but this one.
revoke all on api_keys from polytower_reader;
"""


def upgrade() -> None:
    op.execute(TABLE)


def downgrade() -> None:
    op.execute("drop table api_keys")

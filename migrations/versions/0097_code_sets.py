"""Content codes by sets: the codebooks of all modalities share one space, and are made, used and replaced together.

Compatibility: the two tables were never filled; code that is older neither reads nor writes them.
"""

from alembic import op

revision = "0097"
down_revision = "0096"
branch_labels = None
depends_on = None

TABLES = """
drop table content_codes, codebooks;

create table code_sets (
    code_set bigint generated always as identity primary key,
    revisions jsonb not null,
    weights jsonb not null,
    trained_on bigint not null check (trained_on > 0),
    dim integer not null check (dim > 0),
    levels integer not null check (levels > 0),
    residual_centroids real[] not null,
    metrics jsonb not null default '{}',
    active boolean not null default false,
    created_at timestamptz not null default now()
);
create unique index code_sets_active_idx on code_sets (active) where active;

create table codebooks (
    codebook_id bigint generated always as identity primary key,
    code_set bigint not null references code_sets on delete cascade,
    modality text not null,
    revision text not null,
    mean real[] not null,
    directions real[] not null,
    subspaces integer not null check (subspaces > 0),
    centroids real[] not null,
    unique (code_set, modality),
    foreign key (modality, revision) references content_encoders
);

create table content_codes (
    codebook_id bigint not null references codebooks on delete cascade,
    item_id text not null,
    codes bytea not null,
    encoded_at timestamptz not null,
    primary key (codebook_id, item_id)
);

create table semantic_ids (
    code_set bigint not null references code_sets on delete cascade,
    item_id text not null,
    semantic_id smallint[] not null,
    primary key (code_set, item_id)
);

create view item_semantic_ids as
select item_id, semantic_id, code_set
from semantic_ids
join code_sets using (code_set)
where active;
"""

BEFORE = """
drop view item_semantic_ids;
drop table semantic_ids, content_codes, codebooks, code_sets;

create table codebooks (
    codebook_id bigint generated always as identity primary key,
    modality text not null,
    revision text not null,
    subspaces integer not null check (subspaces > 0),
    centroids real[] not null,
    created_at timestamptz not null default now(),
    foreign key (modality, revision) references content_encoders
);

create table content_codes (
    codebook_id bigint not null references codebooks on delete cascade,
    item_id text not null,
    codes bytea not null,
    primary key (codebook_id, item_id)
);
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute(BEFORE)

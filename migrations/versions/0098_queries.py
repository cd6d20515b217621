"""What users searched for: in the sequence feature, and embedded once for each distinct text.

Compatibility: a column with a default and a table that older code neither reads nor writes; a view with one column more
at its end.
"""

from alembic import op

from migrations.install import install

revision = "0098"
down_revision = "0097"
branch_labels = None
depends_on = None

SEQUENCES = """
alter table user_sequences add column queries text[] not null default '{}';

create or replace view feast.user_sequence as
select user_id, as_of, item_ids, feast.epoch_micros(occurred_ats) as occurred_ats, kinds, queries
from user_sequences;

-- Sequences of days with queries are made again by the next refresh.
insert into changed_days
select distinct (occurred_at at time zone 'UTC')::date from interactions where query is not null;
"""

EMBEDDINGS = """
create table query_embeddings (
    modality text not null default 'text',
    revision text not null,
    query_key text not null,
    embedding halfvec not null,
    encoded_at timestamptz not null default now(),
    constraint query_embeddings_pkey primary key (revision, query_key),
    foreign key (modality, revision) references content_encoders
);
"""

DROPS = """
drop table query_embeddings;
drop view feast.user_sequence;
create view feast.user_sequence as
select user_id, as_of, item_ids, feast.epoch_micros(occurred_ats) as occurred_ats, kinds
from user_sequences;
alter table user_sequences drop column queries;
"""


def upgrade() -> None:
    op.execute(SEQUENCES)
    op.execute(EMBEDDINGS)
    install("query_key", 1)


def downgrade() -> None:
    op.execute("drop function query_key")
    op.execute(DROPS)

"""All tables of the contract.

Compatibility: this is the first revision; nothing runs against an older schema.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Ids are text everywhere: what the source called a user or an item is what an analyst reads.
TABLES = """
create table items (
    item_id text primary key,
    title text,
    description text,
    image text,
    image_path text,
    image_sha256 text,
    available boolean not null default true,
    attributes jsonb not null default '{}',
    updated_at timestamptz not null default now()
);
create index items_attributes_idx on items using gin (attributes jsonb_path_ops);

create table users (
    user_id text primary key,
    attributes jsonb not null default '{}',
    updated_at timestamptz not null default now()
);

-- Events of one user at one instant are many in real logs; the order of the source decides, and `position` keeps it.
create sequence interaction_position;
create table interactions (
    user_id text not null,
    item_id text not null,
    occurred_at timestamptz not null,
    kind text not null default 'interaction',
    event_id text not null default '',
    value double precision,
    query text,
    position bigint not null default nextval('interaction_position'),
    constraint interactions_pkey primary key (user_id, occurred_at, item_id, kind, event_id)
) partition by range (occurred_at);
create index interactions_position_idx on interactions (position);
create index interactions_item_idx on interactions (item_id);
create index interactions_event_idx on interactions (event_id) where event_id <> '';

-- Days whose interactions changed since the sequences and statistics were last refreshed: a journal, written by the
-- transaction that changes them (so neither a crash nor a late commit is missed). Days repeat: a unique index would
-- make writers of one day wait for each other.
create table changed_days (day date not null);

-- One row per user and day with activity: the newest row is the online feature, all rows are its history.
create table user_sequences (
    user_id text not null,
    day date not null,
    as_of timestamptz not null,
    item_ids text[] not null,
    occurred_ats timestamptz[] not null,
    kinds text[] not null,
    primary key (user_id, day)
);
create index user_sequences_as_of_idx on user_sequences (user_id, as_of desc);
create index user_sequences_day_idx on user_sequences (day);

create table user_stats (
    user_id text not null,
    day date not null,
    as_of timestamptz not null,
    interactions bigint not null,
    distinct_items bigint not null,
    mean_value double precision,
    first_at timestamptz not null,
    primary key (user_id, day)
);
create index user_stats_as_of_idx on user_stats (user_id, as_of desc);
create index user_stats_day_idx on user_stats (day);

create table item_stats (
    item_id text not null,
    day date not null,
    as_of timestamptz not null,
    interactions bigint not null,
    distinct_users bigint not null,
    mean_value double precision,
    first_at timestamptz not null,
    primary key (item_id, day)
);
create index item_stats_as_of_idx on item_stats (item_id, as_of desc);
create index item_stats_day_idx on item_stats (day);

create table content_encoders (
    modality text not null,
    revision text not null,
    model text not null,
    dim integer not null check (dim > 0),
    config jsonb not null default '{}',
    active boolean not null default false,
    created_at timestamptz not null default now(),
    primary key (modality, revision)
);
create unique index content_encoders_active_idx on content_encoders (modality) where active;

create table content_embeddings (
    item_id text not null,
    modality text not null,
    revision text not null,
    content_hash text not null,
    embedding halfvec not null,
    encoded_at timestamptz not null default now(),
    primary key (item_id, modality, revision),
    foreign key (modality, revision) references content_encoders
);

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

create table generations (
    generation bigint generated always as identity primary key,
    state text not null default 'building'
        check (state in ('building', 'ready', 'live', 'retired', 'failed')),
    dim integer not null check (dim between 1 and 4000),
    interests integer not null check (interests > 0),
    config jsonb not null default '{}',
    metrics jsonb not null default '{}',
    quality jsonb not null default '{}',
    checkpoint_path text,
    checkpoint_sha256 text,
    created_at timestamptz not null default now(),
    ready_at timestamptz,
    live_at timestamptz,
    retired_at timestamptz
);
create unique index generations_live_idx on generations (state) where state = 'live';

-- When each generation was live: a rollback gives one generation a second interval.
create table promotions (
    promotion bigint generated always as identity primary key,
    generation bigint not null references generations,
    live_from timestamptz not null default clock_timestamp(),
    live_until timestamptz,
    constraint promotions_no_overlap exclude using gist (tstzrange(live_from, live_until) with &&)
);

-- The small half of a checkpoint travels with the generation, so that a server needs nothing but Postgres.
create table towers (
    generation bigint not null references generations on delete cascade,
    part text not null,
    weights bytea not null,
    config jsonb not null,
    primary key (generation, part)
);

create table item_embeddings (
    generation bigint not null,
    item_id text not null,
    embedding halfvec not null,
    content_embedding halfvec,
    id_embedding halfvec,
    constraint item_embeddings_pkey primary key (generation, item_id)
) partition by list (generation);

create table user_interests (
    generation bigint not null,
    user_id text not null,
    interest smallint not null,
    embedding halfvec not null,
    weight real not null,
    as_of timestamptz not null,
    constraint user_interests_pkey primary key (generation, user_id, interest)
) partition by list (generation);

create table loads (
    load_id bigint generated always as identity primary key,
    source text not null,
    state text not null default 'running' check (state in ('running', 'done', 'failed')),
    counts jsonb not null default '{}',
    started_at timestamptz not null default now(),
    finished_at timestamptz
);

create table rejected_rows (
    load_id bigint not null references loads on delete cascade,
    file text not null,
    row_number bigint not null,
    column_name text,
    reason text not null,
    value text
);
create index rejected_rows_load_idx on rejected_rows (load_id);
"""

# Statement triggers, so that a batch of any size costs one row per day.
FUNCTIONS = """
create function record_changed_days() returns trigger language plpgsql set search_path = polytower, public as $$
begin
    insert into changed_days select distinct (occurred_at at time zone 'UTC')::date from changed_rows;
    return null;
end $$;
create trigger interactions_inserted after insert on interactions
    referencing new table as changed_rows for each statement execute function record_changed_days();
create trigger interactions_deleted after delete on interactions
    referencing old table as changed_rows for each statement execute function record_changed_days();

-- The part of an interaction's key that tells events of one user, item, time and kind apart: the source's event id,
-- else what was searched for (several queries or tags in one second are several events).
create function interaction_event_id(event_id text, query text) returns text immutable language sql as $$
    select case when coalesce(event_id, '') = '' and query <> '' then 'query:' || md5(query)
                else coalesce(event_id, '') end
$$;

-- Interactions are partitioned by year (UTC), on demand. A table is made and then attached, since `create table ...
-- partition of` would lock readers out until the end of the load.
create function ensure_interactions_year(year integer) returns void language plpgsql
set search_path = polytower, public as $$
declare
    partition_name text := format('interactions_y%s', year);
begin
    if to_regclass(partition_name) is not null then
        return;
    end if;
    perform pg_advisory_xact_lock(hashtextextended(partition_name, 0));
    if to_regclass(partition_name) is null then
        execute format('create table %I (like interactions including defaults)', partition_name);
        execute format('alter table interactions attach partition %I for values from (%L) to (%L)', partition_name,
                       make_timestamptz(year, 1, 1, 0, 0, 0, 'UTC'), make_timestamptz(year + 1, 1, 1, 0, 0, 0, 'UTC'));
    end if;
end $$;
"""

VIEWS = """
create view live_generation as select * from generations where state = 'live';

-- One wide row per item: what its content is, by the encoder revision in force for each modality.
create view item_content as
select item_id,
       max(encoded_at) as encoded_at,
       (array_agg(embedding) filter (where modality = 'text'))[1] as text_embedding,
       (array_agg(embedding) filter (where modality = 'image'))[1] as image_embedding,
       (array_agg(embedding) filter (where modality = 'attributes'))[1] as attributes_embedding
from content_embeddings
join content_encoders using (modality, revision)
where active
group by item_id;
"""

# A group role without login (privileges.py makes it): a database administrator grants it to analysts.
READER = """
grant usage on schema polytower to polytower_reader;
grant select on all tables in schema polytower to polytower_reader;
alter default privileges in schema polytower grant select on tables to polytower_reader;
"""

DROPS = """
drop view item_content, live_generation;
drop table rejected_rows, loads, user_interests, item_embeddings, towers, promotions, generations, content_codes,
    codebooks, content_embeddings, content_encoders, item_stats, user_stats, user_sequences, changed_days, interactions,
    users, items;
drop function record_changed_days, interaction_event_id, ensure_interactions_year;
drop sequence interaction_position;
alter default privileges in schema polytower revoke select on tables from polytower_reader;
revoke usage on schema polytower from polytower_reader;
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(FUNCTIONS)
    op.execute(VIEWS)
    op.execute(READER)


def downgrade() -> None:
    op.execute(DROPS)

"""The views: what is live, what an item is, and behind Feast's sources one row per entity and moment of change.

Compatibility: nothing looked at these before. The schema feast (privileges.py makes it) also takes Feast's registry and
the entity tables of its historical joins: they never mix with ours.
"""

from alembic import op

revision = "0062"
down_revision = "0061"
branch_labels = None
depends_on = None

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

# Times inside features are microseconds since 1970 (bigint): Feast's own timestamps stop at whole seconds.
FEATURE_VIEWS = """
create function feast.epoch_micros(moment timestamptz) returns bigint
language sql immutable strict parallel safe
return (extract(epoch from moment) * 1000000)::bigint;

create function feast.epoch_micros(moments timestamptz[]) returns bigint[]
language sql immutable strict parallel safe
return array(select (extract(epoch from moment) * 1000000)::bigint from unnest(moments) as moment);

create view feast.user_sequence as
select user_id, as_of, item_ids, feast.epoch_micros(occurred_ats) as occurred_ats, kinds
from user_sequences;

create view feast.user_stats as
select user_id,
       as_of,
       interactions as user_interactions,
       distinct_items as user_distinct_items,
       mean_value as user_mean_value,
       feast.epoch_micros(first_at) as user_first_at
from user_stats;

create view feast.item_stats as
select item_id,
       as_of,
       interactions as item_interactions,
       distinct_users as item_distinct_users,
       mean_value as item_mean_value,
       feast.epoch_micros(first_at) as item_first_at
from item_stats;

create view feast.item_attributes as
select item_id, updated_at as as_of, title, description, available, attributes::text as attributes
from items;

create view feast.item_content as
select item_id,
       encoded_at as as_of,
       text_embedding::real[] as text_embedding,
       image_embedding::real[] as image_embedding,
       attributes_embedding::real[] as attributes_embedding
from item_content;

-- A generation that was live twice (rollback) has two rows here: at any time the newest promotion is the one in force.
-- The second half says what the end of a promotion took away: who is not in the next generation has nulls from then on,
-- where Feast's joins would go on with the embedding of a generation that is no longer live.
create view feast.item_embedding as
select item_id,
       live_from as as_of,
       embedding::real[] as embedding,
       content_embedding::real[] as content_embedding,
       id_embedding::real[] as id_embedding,
       generation as embedding_generation
from promotions
join item_embeddings using (generation)
union all
select item_id, live_until, null, null, null, null
from promotions as ended
join item_embeddings using (generation)
where live_until is not null
  and not exists (
      select from promotions as following
      join item_embeddings as kept using (generation)
      where following.live_from = ended.live_until and kept.item_id = item_embeddings.item_id
  );

-- K interests of D numbers each, flattened row by row: interest i is interests[i*D+1 : (i+1)*D].
create view feast.user_interests as
select user_id,
       live_from as as_of,
       array(select unnest(array_agg(embedding::real[] order by interest))) as interests,
       array_agg(weight order by interest) as interest_weights,
       count(*) as interest_count,
       max(vector_dims(embedding))::bigint as interest_dim,
       generation as interests_generation
from promotions
join user_interests using (generation)
group by user_id, live_from, generation
union all
select distinct user_id, live_until, null::real[], null::real[], null::bigint, null::bigint, null::bigint
from promotions as ended
join user_interests using (generation)
where live_until is not null
  and not exists (
      select from promotions as following
      join user_interests as kept using (generation)
      where following.live_from = ended.live_until and kept.user_id = user_interests.user_id
  );
"""

# The registry goes too: `feast apply` writes it anew from feature_repo/.
DROPS = """
drop schema feast cascade;
drop view item_content, live_generation;
"""


def upgrade() -> None:
    op.execute(VIEWS)
    op.execute(FEATURE_VIEWS)


def downgrade() -> None:
    op.execute(DROPS)

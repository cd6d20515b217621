"""How each feature view is read at a moment: one lateral subquery per view over our own tables, for training sets.

A row at time t gets what was known before it: events strictly before t, and what was promoted, loaded or encoded by t.
Each subquery finds its row through an index, where a join over the whole history sorts it.
"""

from typing import LiteralString

from feature_repo.schema import (
    ITEM_ATTRIBUTES_VIEW,
    ITEM_CONTENT_VIEW,
    ITEM_EMBEDDING_VIEW,
    ITEM_STATS_VIEW,
    USER_INTERESTS_VIEW,
    USER_SEQUENCE_VIEW,
    USER_STATS_VIEW,
)
from feature_repo.views.content_columns import with_embeddings

# View → subquery with the view's features, given wanted.user_id or wanted.item_id, and wanted.moment (timestamptz).
# {length}: events of a sequence at most.
# Names are qualified: Feast's offline store has a search path of its own.
HISTORICAL_VIEWS: dict[str, LiteralString] = {
    # The last finished day, and of the event's own day what came before the event; the newest of both.
    USER_SEQUENCE_VIEW: """
        select item_ids[cardinality(item_ids) - {length} + 1 :] as item_ids,
               feast.epoch_micros(moments[cardinality(moments) - {length} + 1 :]) as occurred_ats,
               kinds[cardinality(kinds) - {length} + 1 :] as kinds,
               case when array_remove(newest.queries, '') = '{{}}' then '{{}}' else newest.queries end as queries
        from (
            select past.item_ids || today.item_ids[places.first : places.last] as item_ids,
                   past.occurred_ats || today.occurred_ats[places.first : places.last] as moments,
                   past.kinds || today.kinds[places.first : places.last] as kinds,
                   -- a row without any query has none listed
                   case when past.queries = '{{}}' then array_fill(''::text, array[cardinality(past.item_ids)])
                        else past.queries end
                   || case when today.queries = '{{}}'
                           then array_fill(''::text, array[greatest(places.last - places.first + 1, 0)])
                           else today.queries[places.first : places.last] end as queries
            from (values (1)) as one (row)
            left join lateral (
                select * from polytower.user_sequences
                where user_id = wanted.user_id and as_of < wanted.moment order by as_of desc limit 1
            ) as past on true
            left join lateral (
                select * from polytower.user_sequences
                where user_id = wanted.user_id and day = (wanted.moment at time zone 'UTC')::date
                  and as_of >= wanted.moment
            ) as today on true
            cross join lateral (
                select count(*) filter (where event <= past.as_of)::integer + 1 as first,
                       count(*) filter (where event < wanted.moment)::integer as last
                from unnest(today.occurred_ats) as event
            ) as places
            where past.user_id is not null or places.first <= places.last
        ) as joined
        cross join lateral (select queries[cardinality(queries) - {length} + 1 :] as queries) as newest
    """,
    USER_STATS_VIEW: """
        select interactions as user_interactions, distinct_items as user_distinct_items,
               mean_value as user_mean_value, feast.epoch_micros(first_at) as user_first_at
        from polytower.user_stats
        where user_id = wanted.user_id and as_of < wanted.moment order by as_of desc limit 1
    """,
    ITEM_STATS_VIEW: """
        select interactions as item_interactions, distinct_users as item_distinct_users,
               mean_value as item_mean_value, feast.epoch_micros(first_at) as item_first_at
        from polytower.item_stats
        where item_id = wanted.item_id and as_of < wanted.moment order by as_of desc limit 1
    """,
    ITEM_ATTRIBUTES_VIEW: """
        select title, description, available, attributes::text as attributes
        from polytower.items where item_id = wanted.item_id and updated_at <= wanted.moment
    """,
    ITEM_CONTENT_VIEW: with_embeddings(
        """
        select {embeddings}
        from polytower.content_embeddings
        join polytower.content_encoders using (modality, revision)
        where active and item_id = wanted.item_id
        having max(encoded_at) <= wanted.moment
        """,
        cast="::real[]",
    ),
    ITEM_EMBEDDING_VIEW: """
        select embedding::real[] as embedding, content_embedding::real[] as content_embedding,
               id_embedding::real[] as id_embedding, generation as embedding_generation
        from polytower.promotions
        join polytower.item_embeddings using (generation)
        where live_from <= wanted.moment and (live_until is null or wanted.moment < live_until)
          and item_id = wanted.item_id
    """,
    USER_INTERESTS_VIEW: """
        select array(select unnest(array_agg(embedding::real[] order by interest))) as interests,
               array_agg(weight order by interest) as interest_weights, count(*) as interest_count,
               max(public.vector_dims(embedding))::bigint as interest_dim, generation as interests_generation
        from polytower.promotions
        join polytower.user_interests using (generation)
        where live_from <= wanted.moment and (live_until is null or wanted.moment < live_until)
          and user_id = wanted.user_id
        group by generation
    """,
}

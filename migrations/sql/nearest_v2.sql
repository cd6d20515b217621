-- The items nearest to one vector: in the space of item, content or ID embeddings (item, content, id), or in a content
-- encoder's own space (text, image, …). Score: inner product, higher is better. filter: a JSON object over attributes.
create or replace function nearest(vector halfvec, k int default 10, space text default 'item', filter jsonb default '{}')
returns setof neighbour
language sql stable
set search_path = polytower, public
as $$
    select r.item_id, r.score, r.rank, r.generation
    from retrieve_vectors(array[nearest.vector], k => nearest.k, filter => nearest.filter, space => nearest.space) r
$$;

-- The ten items of one generation nearest to a vector, but one. Exact: what generation_diff compares. Internal.
create or replace function nearest_of(generation bigint, vector halfvec, other text) returns table (item_id text)
language plpgsql stable
set search_path = polytower, public
as $$
begin
    return query execute format(
        'select e.item_id from %I e where e.item_id <> $2 order by (e.embedding <#> $1), e.item_id collate "C" limit 10',
        'item_embeddings_g' || generation) using vector, other;
end $$;

-- The first `depth` qualifying items of each query vector by walks over the HNSW index of one partition (approximate).
-- Internal: callers have checked everything. space_column: a column of item_embeddings. path: a compiled filter or null.
create function walked_lists(
    generation bigint, dim int, space_column text, queries halfvec[], depth int, path jsonpath, exclude text[],
    out interest int, out item_id text, out score real)
returns setof record
language plpgsql stable
-- Listed here so that what set_config changes below ends with the call and never reaches the caller's transaction.
set search_path = polytower, public
set hnsw.ef_search = 100
set hnsw.iterative_scan = strict_order
set hnsw.max_scan_tuples = 200000
set hnsw.scan_mem_multiplier = 4
-- The planner cannot price the subselects, and takes a full scan for cheap.
set enable_seqscan = off
set enable_sort = off
as $$
declare
    conditions text := 'true';
begin
    -- What is excluded lies near the interests: leave room for it, or the walk starts again for the last few items.
    -- The far end of a long list is the least exact part of a walk; beyond 200 it gets half as much room again.
    perform set_config('hnsw.ef_search', least(1000, depth + least(cardinality(exclude), depth / 4)
                                                     + greatest(0, depth - 200) / 2)::text, true);
    if exclude <> '{}' then
        conditions := 'e.item_id <> all ($3)';
    end if;
    -- Subselects, not joins: a join may be planned as a hash join, which loses the index's order.
    if path is not null then
        conditions := conditions
            || ' and (select i.available and i.attributes @@ $4 from items i where i.item_id = e.item_id)';
    elsif exists (select from items i where not i.available) then
        conditions := conditions
            || ' and (select true from items i where i.item_id = e.item_id and not i.available) is not true';
    end if;
    return query execute format($sql$
        select q.number::int, c.item_id, c.score
        from unnest($1) with ordinality q (vector, number)
        cross join lateral (
            select e.item_id, (-(e.%1$I::halfvec(%2$s) <#> q.vector))::real as score from %3$I e where %4$s
            order by e.%1$I::halfvec(%2$s) <#> q.vector limit $2
        ) c $sql$, space_column, dim, 'item_embeddings_g' || generation, conditions)
    using queries, depth, exclude, path;
end $$;

-- The first `depth` qualifying items of each query vector by walks over the HNSW index of a space (approximate).
-- Null arrays where they hold fewer than `depth` different items: the graph may have run dry. Internal: callers have
-- checked everything. path: a compiled filter or null.
create or replace function walked_lists(
    space space_source, queries halfvec[], depth int, path jsonpath, exclude text[],
    out interests int[], out item_ids text[], out scores real[])
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
    found_ids text[];
    found_scores real[];
begin
    -- What is excluded lies near the interests: leave room for it, or the walk starts again for the last few items.
    -- The far end of a long list is the least exact part of a walk; beyond 200 it gets half as much room again.
    perform set_config('hnsw.ef_search', least(1000, depth + least(cardinality(exclude), depth / 4)
                                                     + greatest(0, depth - 200) / 2)::text, true);
    for n in 1..cardinality(queries) loop
        execute format('select coalesce(array_agg(item_id), %L), coalesce(array_agg(score), %L)'
                       ' from (%s limit %s) l (item_id, score)', '{}', '{}',
                       walk_statement(space, path, exclude), depth)
            into found_ids, found_scores using queries[n], exclude, path;
        interests := interests || array_fill(n, array[cardinality(found_ids)]);
        item_ids := item_ids || found_ids;
        scores := scores || found_scores;
    end loop;
    if (select count(distinct i collate "C") from unnest(item_ids) i) < depth then
        interests := null;
        item_ids := null;
        scores := null;
    end if;
end $$;

-- The first `depth` qualifying items of each query vector, from one partition. Internal: callers have checked everything.
-- space_column: a column of item_embeddings. path: a compiled filter or null. exact: scan, or walk the HNSW index.
-- members: the qualifying item ids where a selective filter has already found them, else null.
create function interest_lists(
    generation bigint, dim int, space_column text, queries halfvec[], depth int, path jsonpath, exclude text[],
    exact bool, members text[] default null, out interest int, out item_id text, out score real)
returns setof record
language plpgsql stable
-- Listed here so that what set_config changes below ends with the call and never reaches the caller's transaction.
set search_path = polytower, public
set hnsw.ef_search = 100
set hnsw.iterative_scan = strict_order
set hnsw.max_scan_tuples = 200000
set hnsw.scan_mem_multiplier = 4
as $$
declare
    conditions text := format('e.%I is not null', space_column);
begin
    if not exact then
        -- Below depth, pgvector would walk on in small steps; what is excluded lies near the interests, so leave room for it.
        perform set_config('hnsw.ef_search', least(1000, depth + least(cardinality(exclude), depth / 4))::text, true);
    end if;
    if exclude <> '{}' then
        conditions := conditions || ' and e.item_id <> all ($3)';
    end if;
    -- Subselects, not joins: a join may be planned as a hash join, which loses the index's order.
    if members is not null then
        conditions := conditions || ' and e.item_id = any ($5)';
    elsif path is not null then
        conditions := conditions
            || ' and (select i.available and i.attributes @@ $4 from items i where i.item_id = e.item_id)';
    elsif exists (select from items i where not i.available) then
        conditions := conditions
            || ' and (select true from items i where i.item_id = e.item_id and not i.available) is null';
    end if;
    if exact then
        return query execute format($sql$
            with qualifying as materialized (
                select e.item_id, e.%I::halfvec(%s) as vector from %I e where %s
            )
            select q.number::int, c.item_id, c.score
            from unnest($1) with ordinality q (vector, number)
            cross join lateral (
                select item_id, (-(vector <#> q.vector))::real as score from qualifying
                order by score desc, item_id collate "C" limit $2
            ) c $sql$, space_column, dim, 'item_embeddings_g' || generation, conditions)
        using queries, depth, exclude, path, members;
    else
        return query execute format($sql$
            select q.number::int, c.item_id, c.score
            from unnest($1) with ordinality q (vector, number)
            cross join lateral (
                select e.item_id, (-(e.%1$I::halfvec(%2$s) <#> q.vector))::real as score from %3$I e where %4$s
                order by e.%1$I::halfvec(%2$s) <#> q.vector limit $2
            ) c $sql$, space_column, dim, 'item_embeddings_g' || generation, conditions)
        using queries, depth, exclude, path, members;
    end if;
end $$;

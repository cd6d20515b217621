-- The first `depth` qualifying items of each query vector by one scan (exact). Internal: callers have checked everything.
-- members: the ids that a filter left, or null for all available items that match path (null: any).
create or replace function scanned_lists(
    space space_source, queries halfvec[], depth int, path jsonpath, exclude text[],
    members text[], out interest int, out item_id text, out score real)
returns setof record
language plpgsql stable
set search_path = polytower, public
as $$
begin
    -- One sort by score and id keeps only the best; a limit with ties would sort everything. Ids are compared by byte,
    -- where scores are equal only. `offset 0` keeps the score a column of its own.
    return query execute format($sql$
        with qualifying as materialized (
            select e.item_id, e.%1$I::halfvec(%2$s) as vector from %3$s
            where e.%1$I is not null and e.item_id <> all ($3) and %4$s and %5$s
        )
        select q.number::int, c.item_id, c.score
        from unnest($1) with ordinality q (vector, number)
        cross join lateral (
            select item_id, score from (
                select item_id, (-(vector <#> q.vector))::real as score from qualifying offset 0
            ) scored order by score desc, item_id collate "C" limit $2
        ) c $sql$, space.space_column, space.dim,
        -- The limit keeps this a look-up of each member, by hash; the planner would read the whole partition for a few
        -- per cent.
        case when members is not null
                 then format('unnest($5) m (id) cross join lateral (select e.item_id, e.%I from %I e'
                             ' where %s and e.item_id = m.id limit 1) e',
                             space.space_column, space.relation, space.condition)
             else format('%I e', space.relation) end,
        case when members is not null then 'true' else space.condition end,
        case when members is not null then 'true'
             when path is not null
                 then 'e.item_id in (select i.item_id from items i where i.available and i.attributes @@ $4)'
             else 'not exists (select from items i where i.item_id = e.item_id and not i.available)' end)
    using queries, depth, exclude, path, members;
end $$;

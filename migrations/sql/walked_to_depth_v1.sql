-- Per-interest lists by index walks, as deep as the merged top k needs; nulls when they hold fewer than k items.
create function walked_to_depth(
    generation bigint, dim int, space_column text, queries halfvec[], depth int, k int, path jsonpath, exclude text[],
    out interests int[], out item_ids text[], out scores real[])
language plpgsql stable
set search_path = polytower, public
as $$
declare
    again int[];
    deepest int;
    fresh record;
begin
    select array_agg(l.interest), array_agg(l.item_id), array_agg(l.score) into interests, item_ids, scores
    from walked_lists(generation, dim, space_column, queries, depth, path, exclude) l;
    if depth < k then
        select array_agg(d.interest), max(d.deeper) into again, deepest
        from deeper_lists(interests, item_ids, scores, depth, k) d where d.deeper - depth > k / 100;
    end if;
    if again is not null then
        select array_agg(again[l.interest]) as interests, array_agg(l.item_id) as item_ids, array_agg(l.score) as scores
        into fresh
        from walked_lists(generation, dim, space_column, (select array_agg(queries[n]) from unnest(again) n),
                          deepest, path, exclude) l;
        select array_agg(n), array_agg(i), array_agg(s) into interests, item_ids, scores from (
            select n, i, s from unnest(interests, item_ids, scores) f (n, i, s) where n <> all (again)
            union all
            select n, i, s from unnest(fresh.interests, fresh.item_ids, fresh.scores) f (n, i, s)
        ) l;
    end if;
    if (select count(distinct i collate "C") from unnest(item_ids) i) < k then
        interests := null;
        item_ids := null;
        scores := null;
    end if;
end $$;

-- How deep to go on in each interest whose list of `depth` items ends above the merged k-th score: null for none.
-- An interest whose last item scores below that can add nothing (threshold algorithm). For the others, scores fall about
-- evenly with the logarithm of the rank; what the second half of the list lost tells how many items are still to come.
-- Less than 1 % of k to come is not worth another walk.
create function deeper_lists(interests int[], item_ids text[], scores real[], depth int, k int, out interest int, out deeper int)
returns setof record
language plpgsql immutable parallel safe
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    bar real;
begin
    select s into bar from (select max(s) as s from unnest(item_ids, scores) l (i, s) group by i) best
    order by s desc offset k - 1 limit 1;
    return query
    select n, case when bar is null or half - last < 1e-6 then k
                   else least(k, ceil(depth * 2 ^ least(10, 1.1 * (last - bar) / (half - last)))::int) end
    from (
        select n, min(s) as last, (array_agg(s order by s desc))[(depth + 1) / 2] as half
        from unnest(interests, scores) l (n, s) group by n having count(*) >= depth
    ) ends
    where bar is null or last > bar;
end $$;

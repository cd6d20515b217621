-- Interests whose list of `depth` items may go on above the merged k-th score: only they are asked for more.
-- An interest whose last item scores below that can add nothing, so what the others hold is the answer (threshold algorithm).
create function unfinished_interests(numbers int[], item_ids text[], scores real[], depth int, k int) returns int[]
language sql immutable parallel safe
set search_path = polytower, public
as $$
    with lists as (
        select n, i, s from unnest(numbers, item_ids, scores) l (n, i, s)
    ), bar as (
        select score from (select max(s) as score from lists group by i) best order by score desc offset k - 1 limit 1
    )
    select coalesce(array_agg(n order by n), '{}') from (
        select n from lists group by n
        having count(*) >= depth and min(s) > coalesce((select score from bar), '-infinity')
    ) open_lists
$$;

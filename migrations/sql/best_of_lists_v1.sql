-- One row per item of per-interest lists: item i, its best score s, the interest n that gave it (of equals the lowest)
-- and its rank r there; ns, rs, ss: all interests that found it, with its rank and score in each, by interest.
create or replace function best_of_lists(interests int[], item_ids text[], scores real[])
returns table (i text, s real, n int, r int, ns int[], rs int[], ss real[])
language sql immutable parallel safe
set search_path = polytower, public
as $$
    select distinct on (i collate "C") i, s, n, r,
           array_agg(n) over item, array_agg(r) over item, array_agg(s) over item
    from ranked_lists(interests, item_ids, scores)
    window item as (partition by i collate "C" order by n rows between unbounded preceding and unbounded following)
    order by i collate "C", s desc, n
$$;

-- Unfolds per-interest lists into rows: interest n, item i, score s, rank r within the interest. Inlined into its caller.
create or replace function ranked_lists(interests int[], item_ids text[], scores real[])
returns table (n int, i text, s real, r int)
language sql immutable parallel safe
as $$
    select n, i, s, row_number() over (partition by n order by s desc, i collate "C")::int
    from unnest(interests, item_ids, scores) l (n, i, s)
$$;

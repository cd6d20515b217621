-- Merges per-interest lists into one: dedupe by item id, best score kept, with the interest that gave it and the rank there.
-- max: by score. quota: each interest places as many as its share of the weights, the rest goes by score.
-- rrf: reciprocal rank fusion; the sum of 1 / (60 + rank) over the interests that found the item becomes the score.
-- Ties: item id ascending, by bytes. Interests count from 1 here. A pair of interest and item comes once.
create function merge_lists(
    interests int[], item_ids text[], scores real[], weights real[], k int, merge text,
    out item_id text, out score real, out rank int, out interest int, out interest_rank int)
returns setof record
language plpgsql stable parallel safe
set search_path = polytower, public
as $$
#variable_conflict use_column
begin
    if merge = 'max' then
        return query
        select c.i, c.s, row_number() over (order by c.s desc, c.i collate "C")::int, c.n, c.r from (
            select distinct on (i collate "C") i, s, n, r
            from ranked_lists(interests, item_ids, scores) order by i collate "C", s desc, n
        ) c order by c.s desc, c.i collate "C" limit k;
    elsif merge = 'quota' then
        return query
        with best as (
            select distinct on (i collate "C") i, s, n, r
            from ranked_lists(interests, item_ids, scores) order by i collate "C", s desc, n
        ), placed as (
            select b.*, row_number() over (partition by n order by s desc, i collate "C") > q.quota as over_quota
            from best b join interest_quotas(weights, k) q (number, quota) on q.number = b.n
        ), cut as (
            select * from placed order by over_quota, s desc, i collate "C" limit k
        )
        select i, s, row_number() over (order by s desc, i collate "C")::int, n, r from cut order by 3;
    else
        return query
        select c.i, c.fused, row_number() over (order by c.fused desc, c.i collate "C")::int, c.n, c.r from (
            select distinct on (i collate "C") i, n, r,
                   (sum(1.0::float8 / (60 + r)) over (partition by i collate "C" order by r
                        rows between unbounded preceding and unbounded following))::real as fused
            from ranked_lists(interests, item_ids, scores) order by i collate "C", s desc, n
        ) c order by c.fused desc, c.i collate "C" limit k;
    end if;
end $$;

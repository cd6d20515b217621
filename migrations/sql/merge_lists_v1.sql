-- Merges per-interest lists into one: dedupe by item id, best score kept, with the interest that gave it and the rank
-- there, and beside it all interests that found the item, with its rank and score in each.
-- max: by score. quota: each interest places as many as its share of the weights, the rest goes by score.
-- rrf: reciprocal rank fusion; the sum of 1 / (60 + rank) over the interests that found the item becomes the score.
-- soft: .07 · log of the sum of exp(score / .07) over the interests that found the item becomes the score.
-- diverse: picked one by one (diverse_picks).
-- Ties: item id ascending, by bytes. Interests count from 1 here. A pair of interest and item comes once.
create or replace function merge_lists(
    interests int[], item_ids text[], scores real[], weights real[], k int, merge text, diversity jsonb,
    out item_id text, out score real, out rank int, out interest int, out interest_rank int,
    out found_by int[], out found_ranks int[], out found_scores real[])
returns setof record
language plpgsql stable parallel safe
set search_path = polytower, public
as $$
#variable_conflict use_column
begin
    if merge = 'max' then
        return query
        select c.i, c.s, row_number() over (order by c.s desc, c.i collate "C")::int, c.n, c.r, c.ns, c.rs, c.ss
        from best_of_lists(interests, item_ids, scores) c order by c.s desc, c.i collate "C" limit k;
    elsif merge = 'quota' then
        return query
        with placed as (
            select b.*, row_number() over (partition by n order by s desc, i collate "C") > q.quota as over_quota
            from best_of_lists(interests, item_ids, scores) b join interest_quotas(weights, k) q (number, quota) on q.number = b.n
        ), cut as (
            select * from placed order by over_quota, s desc, i collate "C" limit k
        )
        select i, s, row_number() over (order by s desc, i collate "C")::int, n, r, ns, rs, ss from cut order by 3;
    elsif merge = 'rrf' then
        return query
        select c.i, c.fused, row_number() over (order by c.fused desc, c.i collate "C")::int, c.n, c.r, c.ns, c.rs, c.ss
        from (
            select b.*, (select sum(1.0::float8 / (60 + rank) order by rank) from unnest(rs) rank)::real as fused
            from best_of_lists(interests, item_ids, scores) b
        ) c order by c.fused desc, c.i collate "C" limit k;
    elsif merge = 'soft' then
        return query
        select c.i, c.soft, row_number() over (order by c.soft desc, c.i collate "C")::int, c.n, c.r, c.ns, c.rs, c.ss
        from (
            select b.*, (s::float8 + 0.07::float8 * (
                select ln(sum(exp((x::float8 - s::float8) / 0.07::float8) order by place))
                from unnest(ss) with ordinality found (x, place)))::real as soft
            from best_of_lists(interests, item_ids, scores) b
        ) c order by c.soft desc, c.i collate "C" limit k;
    else
        return query
        with pool as (
            select b.*, row_number() over (order by s desc, i collate "C")::int as position
            from best_of_lists(interests, item_ids, scores) b
        )
        select p.i, p.s, picked.rank::int, p.n, p.r, p.ns, p.rs, p.ss
        from diverse_picks((select array_agg(i order by position) from pool),
                           (select array_agg(s order by position) from pool), k, diversity)
             with ordinality picked (position, rank)
        join pool p using (position) order by picked.rank;
    end if;
end $$;

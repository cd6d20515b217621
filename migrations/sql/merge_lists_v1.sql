-- Merges per-interest lists into one: dedupe by item id, best score kept, with the interest that gave it and the rank there.
-- max: by score. quota: each interest places as many as its share of the weights, then by score.
-- rrf: reciprocal rank fusion, the sum of 1 / (60 + rank) over the interests that found the item, is the score.
-- Ties: item id ascending, by bytes. Interests count from 1 here.
create function merge_lists(
    interests int[], item_ids text[], scores real[], weights real[], k int, merge text,
    out item_id text, out score real, out rank int, out interest int, out interest_rank int)
returns setof record
language plpgsql stable parallel safe
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    quotas int[];
begin
    if merge = 'quota' then
        -- Largest remainder: the shares add up to k.
        select array_agg(share order by number) into quotas from (
            select number, floor(exact)::int + (row_number() over (order by exact - floor(exact) desc, number)
                                                <= k - sum(floor(exact)) over ())::int as share
            from (select number, k * weight / sum(weight) over () as exact
                  from unnest(weights::float8[]) with ordinality w (weight, number)) shares
        ) whole;
    end if;
    return query
    with lists as (
        select item_id, score, interest,
               row_number() over (partition by interest order by score desc, item_id collate "C")::int as interest_rank
        from unnest(item_ids, scores, interests) l (item_id, score, interest)
    ), best as (
        select distinct on (item_id collate "C") item_id, score, interest, interest_rank,
               case merge when 'rrf' then sum(1.0::float8 / (60 + interest_rank)) over (partition by item_id) end as fused
        from lists order by item_id collate "C", score desc, interest
    ), placed as (
        select *, case merge when 'quota' then
                      row_number() over (partition by interest order by score desc, item_id collate "C")
                      <= quotas[interest] else true end as within
        from best
    ), cut as (
        select * from placed order by within desc, coalesce(fused, score) desc, item_id collate "C" limit k
    )
    select item_id, coalesce(fused, score)::real,
           row_number() over (order by coalesce(fused, score) desc, item_id collate "C")::int, interest, interest_rank
    from cut order by 3;
end $$;

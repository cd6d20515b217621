-- Shares k places among interests by weight, by largest remainder: the shares add up to k. Interests count from 1.
create or replace function interest_quotas(weights real[], k int, out number int, out quota int)
returns setof record
language sql immutable parallel safe
as $$
    select n::int, floor(share)::int + (row_number() over (order by share - floor(share) desc, n)
                                        <= k - sum(floor(share)) over ())::int
    from (select n, k * weight / sum(weight) over () as share
          from unnest(weights::float8[]) with ordinality w (weight, n)) shares
$$;

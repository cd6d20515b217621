-- One vector of several: their sum by weights, which may be negative, scaled to unit length. Internal. Raises PT006 where
-- they cancel out.
create or replace function summed(vectors halfvec[], weights real[]) returns halfvec
language plpgsql immutable parallel safe
set search_path = polytower, public
as $$
declare
    total float8[];
    size float8;
begin
    select array_agg(s.value order by s.place), sqrt(sum(s.value ^ 2)) into total, size from (
        select e.place, sum(e.value::float8 * q.weight::float8 order by q.number) as value
        from unnest(vectors, weights) with ordinality q (vector, weight, number)
        cross join lateral unnest(q.vector::real[]) with ordinality e (value, place)
        group by e.place
    ) s;
    if size < 1e-6 then
        raise exception 'the vectors cancel out: their weighted sum is zero' using errcode = 'PT006';
    end if;
    return (select array_agg((t / size)::real order by place) from unnest(total) with ordinality u (t, place))::halfvec;
end $$;

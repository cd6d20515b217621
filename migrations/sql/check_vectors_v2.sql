-- Refuses interests that do not fit the space. halfvec itself holds no NaN and no infinity. signed: weights may be
-- negative.
create or replace function check_vectors(interests halfvec[], weights real[], dim int, space text, signed bool) returns void
language plpgsql immutable parallel safe
set search_path = polytower, public
as $$
declare
    wrong int;
begin
    if coalesce(cardinality(interests), 0) not between 1 and 64 or array_ndims(interests) <> 1 then
        raise exception 'a question holds from 1 to 64 interests, not %', coalesce(cardinality(interests), 0)
            using errcode = 'PT005';
    end if;
    select coalesce(vector_dims(i), 0) into wrong from unnest(interests) i
    where vector_dims(i) is distinct from dim limit 1;
    if found then
        raise exception 'a vector of % dimensions was given, and the space "%" has %', wrong, space, dim
            using errcode = 'PT005';
    end if;
    if cardinality(weights) <> cardinality(interests) then
        raise exception '% weights were given for % interests', cardinality(weights), cardinality(interests)
            using errcode = 'PT005';
    end if;
    if exists (select from unnest(weights) w where w is null or w = 'NaN' or (w < 0 and not signed) or abs(w) = 'infinity')
       or (select sum(abs(w)) from unnest(weights) w) = 0 then
        raise exception 'weights are finite, not all zero, and negative for merge "sum" alone' using errcode = 'PT006';
    end if;
end $$;

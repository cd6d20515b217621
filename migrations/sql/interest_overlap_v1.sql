-- How alike two users' interests are in the live generation: the cosine of each pair, closest first, with the weights.
create or replace function interest_overlap(a text, b text)
returns table (interest_a smallint, interest_b smallint, similarity real, weight_a real, weight_b real)
language sql stable
set search_path = polytower, public
as $$
    select x.interest, y.interest, (-(x.embedding <#> y.embedding))::real, x.weight, y.weight
    from user_interests(interest_overlap.a) x cross join user_interests(interest_overlap.b) y
    order by 3 desc, 1, 2
$$;

create or replace function interest_overlap(a bigint, b bigint)
returns table (interest_a smallint, interest_b smallint, similarity real, weight_a real, weight_b real)
language sql stable
set search_path = polytower, public
as $$ select * from interest_overlap(a::text, b::text) $$;

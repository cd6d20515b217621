-- The interests of a user in the live generation, each with its weight and the time of the newest event that it knows.
create or replace function user_interests(user_id text)
returns table (interest smallint, weight real, embedding halfvec, as_of timestamptz, generation bigint)
language plpgsql stable parallel safe
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    served record := served_generation();
begin
    return query
    select u.interest, u.weight, u.embedding, u.as_of, u.generation from user_interests u
    where u.generation = served.served and u.user_id = user_interests.user_id order by u.interest;
    if not found then
        perform raise_unknown_user(user_interests.user_id, served.served);
    end if;
end $$;

create or replace function user_interests(user_id bigint)
returns table (interest smallint, weight real, embedding halfvec, as_of timestamptz, generation bigint)
language sql stable parallel safe
set search_path = polytower, public
as $$ select * from user_interests(user_id::text) $$;

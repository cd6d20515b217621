-- All items that a user ever interacted with, each once.
create or replace function seen_items(user_id text) returns text[]
language sql stable parallel safe
set search_path = polytower, public
as $$
    select coalesce(array_agg(distinct i.item_id), '{}') from interactions i where i.user_id = seen_items.user_id
$$;

create or replace function seen_items(user_id bigint) returns text[]
language sql stable parallel safe
set search_path = polytower, public
as $$ select seen_items(user_id::text) $$;

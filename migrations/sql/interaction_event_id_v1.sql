-- The part of an interaction's key that tells events of one user, item, time and kind apart: the source's event id,
-- else what was searched for (several queries or tags in one second are several events).
create or replace function interaction_event_id(event_id text, query text) returns text immutable language sql as $$
    select case when coalesce(event_id, '') = '' and query <> '' then 'query:' || md5(query)
                else coalesce(event_id, '') end
$$;

-- The newest generation that knew no event of a moment or of later: it was trained before a moment that is not after it
-- (`polytower materialize --before`), and its vectors are there; null without one.
create or replace function trained_generation(moment timestamptz) returns bigint
language sql stable parallel safe
set search_path = polytower, public
as $$
    select generation from generations
    where trained_before <= moment and state in ('ready', 'live', 'retired')
      and to_regclass('item_embeddings_g' || generation) is not null
    order by trained_before desc, generation desc limit 1
$$;

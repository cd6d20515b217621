-- The items most like one item: by what they are and by behaviour (item), by content alone, or by behaviour alone (id).
create or replace function similar_items(item_id text, k int default 10, space text default 'item', filter jsonb default '{}')
returns setof neighbour
language plpgsql stable
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    served record := served_generation();
    vector halfvec;
begin
    perform check_question(k, 'max', space);
    select case similar_items.space when 'item' then e.embedding when 'content' then e.content_embedding
           else e.id_embedding end into vector
    from item_embeddings e where e.generation = served.served and e.item_id = similar_items.item_id;
    if not found then
        raise exception 'generation % has no item "%"', served.served, coalesce(left(similar_items.item_id, 200), 'null')
            using errcode = 'PT003';
    elsif vector is null then
        raise exception 'item "%" has no % embedding', left(similar_items.item_id, 200), space using errcode = 'PT011';
    end if;
    return query
    select r.item_id, r.score, r.rank, r.generation
    from retrieve_vectors(array[vector], k => similar_items.k, filter => similar_items.filter,
                          exclude => array[similar_items.item_id], space => similar_items.space,
                          generation => served.served) r;
end $$;

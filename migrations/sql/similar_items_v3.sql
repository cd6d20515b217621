-- The items most like one item: by what they are and by behaviour (item), by content alone, by behaviour alone (id), or
-- by what a content encoder makes of them (text, image, …).
create or replace function similar_items(item_id text, k int default 10, space text default 'item', filter jsonb default '{}')
returns setof neighbour
language plpgsql stable
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    served record := served_generation();
    source space_source;
    vector halfvec;
begin
    perform check_question(k, 'max');
    source := searched_space(served.served, served.dim, space);
    execute format('select e.%I from %I e where %s and e.item_id = $1', source.space_column, source.relation, source.condition)
        into vector using similar_items.item_id;
    if vector is null then
        if not exists (select from item_embeddings e
                       where e.generation = served.served and e.item_id = similar_items.item_id)
           and not (source.relation = 'content_embeddings'
                    and exists (select from items i where i.item_id = similar_items.item_id)) then
            raise exception 'generation % has no item "%"', served.served, coalesce(left(similar_items.item_id, 200), 'null')
                using errcode = 'PT003';
        end if;
        raise exception 'item "%" has no % embedding', left(similar_items.item_id, 200), space using errcode = 'PT011';
    end if;
    return query
    select r.item_id, r.score, r.rank, r.generation
    from retrieve_vectors(array[vector], k => similar_items.k, filter => similar_items.filter,
                          exclude => array[similar_items.item_id], space => similar_items.space,
                          generation => served.served) r;
end $$;

create or replace function similar_items(item_id bigint, k int default 10, space text default 'item', filter jsonb default '{}')
returns setof neighbour
language sql stable
set search_path = polytower, public
as $$ select * from similar_items(item_id::text, k, space, filter) $$;

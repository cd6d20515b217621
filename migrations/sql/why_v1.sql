-- Why an item suits a user: the interest that scores it best, and of the newest 1000 different items of the user's history
-- the k nearest to it. nearness: cosine with the item in the space of items; to_interest: of the history item with that
-- interest; spaces: cosine of the two items in every space that has both.
create or replace function why(user_id text, item_id text, k int default 5)
returns table (interest smallint, score real, seen_item text, title text, occurred_at timestamptz, nearness real,
               to_interest real, spaces jsonb)
language plpgsql stable
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    served record := served_generation();
    encoders jsonb := (select g.config -> 'encoders' from generations g where g.generation = served.served);
    target record;
    best record;
begin
    perform check_question(k, 'max');
    select e.embedding, e.content_embedding, e.id_embedding into target from item_embeddings e
    where e.generation = served.served and e.item_id = why.item_id;
    if not found then
        raise exception 'generation % has no item "%"', served.served, coalesce(left(why.item_id, 200), 'null')
            using errcode = 'PT003';
    end if;
    select u.interest, u.embedding, (-(u.embedding <#> target.embedding))::real as score into best from user_interests u
    where u.generation = served.served and u.user_id = why.user_id order by 3 desc, 1 limit 1;
    if not found then
        perform raise_unknown_user(why.user_id, served.served);
    end if;
    return query
    with history as (
        select i.item_id, max(i.occurred_at) as occurred_at from interactions i
        where i.user_id = why.user_id and i.item_id <> why.item_id group by 1 order by 2 desc limit 1000
    ), near as (
        select h.item_id, h.occurred_at, e.embedding, e.content_embedding, e.id_embedding,
               (-(e.embedding <#> target.embedding))::real as nearness
        from history h join item_embeddings e on e.generation = served.served and e.item_id = h.item_id
        order by 6 desc, 1 limit k
    )
    select best.interest, best.score, n.item_id, i.title, n.occurred_at, n.nearness,
           (-(n.embedding <#> best.embedding))::real,
           jsonb_strip_nulls(jsonb_build_object(
               'item', round(n.nearness::numeric, 4),
               'content', round((-(n.content_embedding <#> target.content_embedding))::numeric, 4),
               'id', round((-(n.id_embedding <#> target.id_embedding))::numeric, 4)))
           || coalesce((
               select jsonb_object_agg(a.modality, round((-(a.embedding <#> b.embedding))::numeric, 4))
               from content_embeddings a
               join content_embeddings b on b.modality = a.modality and b.revision = a.revision and b.item_id = n.item_id
               where a.item_id = why.item_id and a.revision = encoders ->> a.modality), '{}')
    from (select 1) one left join near n on true left join items i on i.item_id = n.item_id
    order by n.nearness desc, n.item_id;
end $$;

create or replace function why(user_id bigint, item_id bigint, k int default 5)
returns table (interest smallint, score real, seen_item text, title text, occurred_at timestamptz, nearness real,
               to_interest real, spaces jsonb)
language sql stable
set search_path = polytower, public
as $$ select * from why(user_id::text, item_id::text, k) $$;

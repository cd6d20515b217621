-- What differs between two generations: items and users that only one of them has, the share of the ten nearest items (of
-- 100 sampled ones, in the space of items) that both have, and every entry of config and metrics that is not the same.
-- change: b - a, for numbers.
create or replace function generation_diff(a bigint, b bigint)
returns table (name text, in_a text, in_b text, change float8)
language plpgsql stable
set search_path = polytower, public
as $$
#variable_conflict use_column
begin
    perform served_generation(a), served_generation(b);
    if a is null or b is null then
        raise exception 'two generations are compared, and one of them is null' using errcode = 'PT013';
    end if;
    return query
    with counted (name, in_a, in_b) as (
        select 'items', (select count(*) from item_embeddings e where e.generation = a),
               (select count(*) from item_embeddings e where e.generation = b)
        union all
        select 'items that the other lacks',
               (select count(*) from item_embeddings x where x.generation = a
                and not exists (select from item_embeddings y where y.generation = b and y.item_id = x.item_id)),
               (select count(*) from item_embeddings x where x.generation = b
                and not exists (select from item_embeddings y where y.generation = a and y.item_id = x.item_id))
        union all
        select 'users', (select count(distinct u.user_id) from user_interests u where u.generation = a),
               (select count(distinct u.user_id) from user_interests u where u.generation = b)
        union all
        select 'users that the other lacks',
               (select count(distinct x.user_id) from user_interests x where x.generation = a
                and not exists (select from user_interests y where y.generation = b and y.user_id = x.user_id)),
               (select count(distinct x.user_id) from user_interests x where x.generation = b
                and not exists (select from user_interests y where y.generation = a and y.user_id = x.user_id))
    )
    select c.name, c.in_a::text, c.in_b::text, (c.in_b - c.in_a)::float8 from counted c;
    return query
    with probes as (
        select x.item_id, x.embedding as in_a, y.embedding as in_b
        from item_embeddings x join item_embeddings y on y.generation = b and y.item_id = x.item_id
        where x.generation = a order by md5(x.item_id) limit 100
    )
    select 'share of nearest items in both', round(avg((
               select count(*) / 10.0 from nearest_of(a, p.in_a, p.item_id) m
               join nearest_of(b, p.in_b, p.item_id) n using (item_id))), 3)::text, null, null::float8
    from probes p;
    return query
    with recursive flat (generation, name, value) as (
        select g.generation, part.name, part.value from generations g
        cross join lateral (values ('dim', to_jsonb(g.dim)), ('interests', to_jsonb(g.interests)), ('config', g.config),
                                   ('metrics', g.metrics)) part (name, value)
        where g.generation in (a, b)
        union all
        select f.generation, f.name || '.' || entry.key, entry.value from flat f
        cross join lateral jsonb_each(case jsonb_typeof(f.value) when 'object' then f.value end) entry
    ), leaves as (
        select f.generation, f.name, f.value #>> '{}' as said,
               case jsonb_typeof(f.value) when 'number' then (f.value #>> '{}')::float8 end as number
        from flat f where jsonb_typeof(f.value) <> 'object'
    )
    select coalesce(x.name, y.name), x.said, y.said, y.number - x.number
    from (select * from leaves l where l.generation = a) x
    full join (select * from leaves l where l.generation = b) y on y.name = x.name
    where x.said is distinct from y.said order by 1;
end $$;

-- Picks up to k of a pool, one by one: next is the item with the largest score + weight × (how many picked ones share no
-- value of the attribute with it), which is ComiRec's greedy inference (KDD 2020, section 3.4) for items of any number
-- of values. pool: best first. Answers positions in the pool, in the order of picking; of equals the earlier.
create or replace function diverse_picks(item_ids text[], scores real[], k int, diversity jsonb) returns setof int
language plpgsql stable parallel safe
set search_path = polytower, public
as $$
declare
    attribute text := diversity ->> 'attribute';
    weight float8 := (diversity ->> 'weight')::float8;
    -- The values as JSON texts, so that 1 and "1" are two, and 1 and 1.0 one.
    categories jsonb[];
    -- How many picked ones share a value; null once an item is picked itself.
    shared int[] := array_fill(0, array[coalesce(cardinality(item_ids), 0)]);
    pick int;
begin
    select array_agg(coalesce((select jsonb_agg(case jsonb_typeof(value) when 'number' then trim_scale(value::numeric)::text
                                                 else value::text end) from jsonb_array_elements(
               case jsonb_typeof(i.attributes -> attribute) when 'array' then i.attributes -> attribute
                    else jsonb_build_array(i.attributes -> attribute) end) value where value <> 'null'), '[]') order by l.n)
    into categories from unnest(item_ids) with ordinality l (id, n) left join items i on i.item_id = l.id;
    if not exists (select from items where attributes ? attribute) then
        raise exception 'no item has the attribute "%"', attribute using errcode = 'PT007';
    end if;
    for turn in 1..least(k, cardinality(item_ids)) loop
        select n into pick from unnest(scores, shared) with ordinality l (score, times, n)
        where times is not null order by score - weight * times desc, n limit 1;
        return next pick;
        select array_agg(case when n <> pick then times + (values ?| wanted.list)::int end order by n) into shared
        from unnest(shared, categories) with ordinality l (times, values, n),
             (select coalesce(array_agg(value), '{}') as list from jsonb_array_elements_text(categories[pick]) value) wanted;
    end loop;
end $$;

-- Which items a list of allowed ones and a filter leave; null where a filter alone is not selective enough for an exact
-- scan to win. path: the compiled filter, null for none.
-- An exact scan of m items and an index walk that throws most of what it meets away cost the same near
-- m = sqrt(12 × k × items) (measured, 64 dimensions). Raises PT007 for an attribute that no item has.
create or replace function filter_members(path jsonpath, filter jsonb, allow text[], ceiling int) returns text[]
language plpgsql stable
set search_path = polytower, public
as $$
declare
    items float8;
    share float8;
    members text[];
begin
    if allow is not null then
        -- As without a list: an item that is only in the generation is available, and has no attributes.
        select coalesce(array_agg(distinct id), '{}') into members from unnest(allow) id left join items i on i.item_id = id
        where i.available is not false and (path is null or i.attributes @@ path);
        if members = '{}' and path is not null then
            perform raise_unknown_attribute(filter);
        end if;
        return members;
    end if;
    -- A sample of whole pages, about 500 rows, spares a broad filter the count. A wrong guess costs time, never rows.
    select case when reltuples > 4 * ceiling then reltuples end into items from pg_class where oid = 'items'::regclass;
    if items is not null then
        execute format('select count(*) filter (where available and attributes @@ %L) / greatest(count(*), 1)::float8'
                       ' from items tablesample system (%s) repeatable (1)', path, least(100, 50000 / items))
            into share;
        if share * items > 4 * ceiling then
            return null;
        end if;
    end if;
    execute format(
        'select array_agg(item_id) from (select item_id from items where available and attributes @@ %L limit %s) found',
        path, ceiling + 1) into members;
    if members is null then
        perform raise_unknown_attribute(filter);
        return '{}';
    end if;
    return case when cardinality(members) <= ceiling then members end;
end $$;

-- Called where a filter left nothing. Raises PT007 when it names an attribute that no item has, and PT008 when it compares
-- one with a type that none of its values has: a misspelt filter, or "1990" among numbers, is no empty answer.
create or replace function raise_unknown_attribute(filter jsonb) returns void
language plpgsql stable parallel safe
set search_path = polytower, public
as $$
declare
    key text;
    wanted jsonb;
    operator text;
    operand jsonb;
    types text[];
    held text;
begin
    select k into key from jsonb_object_keys(filter) k
    where not exists (select from items where attributes ? k) order by k limit 1;
    if found then
        raise exception 'no item has the attribute "%"', key using errcode = 'PT007';
    end if;
    for key, wanted in select * from jsonb_each(filter) loop
        for operator, operand in
            select * from jsonb_each(case jsonb_typeof(wanted) when 'object' then wanted else jsonb_build_object('', wanted) end)
        loop
            select array_agg(distinct jsonb_typeof(v)) into types
            from jsonb_array_elements(case jsonb_typeof(operand) when 'array' then operand else jsonb_build_array(operand) end) v
            where jsonb_typeof(v) <> 'null';
            continue when types is null or exists (
                select from unnest(types) type join items on jsonb_path_exists(
                    attributes, format('$.%s[*] ? (@.type() == %s)', to_jsonb(key), to_jsonb(type))::jsonpath));
            select jsonb_path_query_first(attributes, format('$.%s[*].type() ? (@ != "null")', to_jsonb(key))::jsonpath) #>> '{}'
            into held from items
            where jsonb_path_exists(attributes, format('$.%s[*].type() ? (@ != "null")', to_jsonb(key))::jsonpath) limit 1;
            if held is not null then
                raise exception 'the attribute "%" holds %s, and the filter compares it with a %: %',
                    key, held, array_to_string(types, ' or a '), left(wanted::text, 80)
                    using errcode = 'PT008',
                          hint = 'numbers go without quotes, text with them: {"gte": 1990}, "1990"';
            end if;
        end loop;
    end loop;
end $$;

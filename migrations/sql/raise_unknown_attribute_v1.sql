-- Raises PT007 when a filter names an attribute that no item has: a misspelt filter is no empty answer.
create function raise_unknown_attribute(filter jsonb) returns void
language plpgsql stable parallel safe
set search_path = polytower, public
as $$
declare
    unknown text;
begin
    select key into unknown from jsonb_object_keys(filter) key
    where not exists (select from items where attributes ? key) order by key limit 1;
    if found then
        raise exception 'no item has the attribute "%"', unknown using errcode = 'PT007';
    end if;
end $$;

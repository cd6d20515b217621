-- Trigger: a generation's rows are written while it is built, and by nobody afterwards.
-- Who means to change one that is ready, as erasure does, sets polytower.amends_generation to on in the transaction.
create or replace function refuse_amendment() returns trigger
language plpgsql
set search_path = polytower, public
as $$
declare
    written bigint := case when tg_op = 'DELETE' then old.generation else new.generation end;
begin
    if coalesce(current_setting('polytower.amends_generation', true), '') <> 'on' and exists (
        select from generations g where g.generation = written and g.state in ('ready', 'live', 'retired')) then
        raise exception 'generation % is built: % of % is refused', written, lower(tg_op), tg_table_name
            using errcode = 'object_not_in_prerequisite_state', hint = 'build another generation; one that is ready stays as its gates saw it';
    end if;
    return case when tg_op = 'DELETE' then old else new end;
end $$;

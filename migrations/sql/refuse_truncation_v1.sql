-- Trigger on a generation's own partitions: they are dropped whole with `polytower generations drop`, never emptied.
create or replace function refuse_truncation() returns trigger
language plpgsql
set search_path = polytower, public
as $$
begin
    raise exception '% is part of a generation: truncate is refused', tg_table_name
        using errcode = 'object_not_in_prerequisite_state', hint = 'polytower generations drop deletes a generation''s vectors';
end $$;

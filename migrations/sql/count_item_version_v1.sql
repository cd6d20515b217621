-- Trigger: counts `item_version` up, before any row of items is taken, so that two writers never wait in a circle.
create or replace function count_item_version() returns trigger language plpgsql security definer
set search_path = polytower, public as $$
begin
    -- Once per transaction: 200,000 single inserts would else leave as many versions of the row to be walked through.
    if current_setting('polytower.items_changed_by', true) is distinct from pg_current_xact_id()::text then
        update item_version set version = version + 1;
        perform set_config('polytower.items_changed_by', pg_current_xact_id()::text, true);
    end if;
    return null;
end $$;

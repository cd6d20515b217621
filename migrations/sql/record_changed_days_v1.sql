-- Trigger: notes the days whose interactions a statement changed. One row per day, whatever the size of the batch.
create or replace function record_changed_days() returns trigger language plpgsql set search_path = polytower, public as $$
begin
    insert into changed_days select distinct (occurred_at at time zone 'UTC')::date from changed_rows;
    return null;
end $$;

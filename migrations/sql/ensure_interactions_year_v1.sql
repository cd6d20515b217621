-- Interactions are partitioned by year (UTC), on demand. A table is made and then attached, since `create table ...
-- partition of` would lock readers out until the end of the load.
create function ensure_interactions_year(year integer) returns void language plpgsql
set search_path = polytower, public as $$
declare
    partition_name text := format('interactions_y%s', year);
begin
    if to_regclass(partition_name) is not null then
        return;
    end if;
    perform pg_advisory_xact_lock(hashtextextended(partition_name, 0));
    if to_regclass(partition_name) is null then
        execute format('create table %I (like interactions including defaults)', partition_name);
        execute format('alter table interactions attach partition %I for values from (%L) to (%L)', partition_name,
                       make_timestamptz(year, 1, 1, 0, 0, 0, 'UTC'), make_timestamptz(year + 1, 1, 1, 0, 0, 0, 'UTC'));
    end if;
end $$;

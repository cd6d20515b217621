-- Makes the partitions of these years of interactions (UTC), with the rights of their owner.
--
-- A table is made and then attached, since `create table ... partition of` would lock readers out until the end of the load.
-- Asked for in one call, several years cannot deadlock with another caller: all their locks come first, in ascending
-- order, then that of the parent. After the wait for a lock, whether a year is there is asked of pg_class under a new
-- snapshot: to_regclass would answer from this session's cache, which an advisory lock does not bring up to date.
create or replace function ensure_interactions_year(variadic years integer[]) returns void
language plpgsql security definer
set search_path = polytower, public as $$
declare
    missing integer;
    wanted integer[] := array(
        select distinct y from unnest(years) y where to_regclass(format('interactions_y%s', y)) is null order by y);
begin
    foreach missing in array wanted loop
        perform pg_advisory_xact_lock(hashtextextended(format('interactions_y%s', missing), 0));
    end loop;
    for missing in
        select y from unnest(wanted) y where not exists (
            select from pg_class where relnamespace = 'polytower'::regnamespace and relname = format('interactions_y%s', y))
    loop
        execute format('create table interactions_y%s (like interactions including defaults)', missing);
        execute format('alter table interactions attach partition interactions_y%s for values from (%L) to (%L)', missing,
                       make_timestamptz(missing, 1, 1, 0, 0, 0, 'UTC'), make_timestamptz(missing + 1, 1, 1, 0, 0, 0, 'UTC'));
    end loop;
end $$;

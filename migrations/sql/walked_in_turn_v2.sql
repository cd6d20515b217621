-- Per-interest lists by index walks (approximate), each only as deep as the merged top k needs: all walks are open at
-- once, and the one whose next item is the best goes on, until k different items have come. A walk continues where it
-- stopped (iterative scan), so asking little of each at first costs nothing later.
-- Null arrays where the walks ran dry before k. Internal: callers have checked everything.
create or replace function walked_in_turn(
    space space_source, queries halfvec[], k int, ef_search int, path jsonpath,
    exclude text[], out interests int[], out item_ids text[], out scores real[])
language plpgsql stable
-- Listed here so that what set_config changes below ends with the call and never reaches the caller's transaction.
set search_path = polytower, public
set hnsw.ef_search = 100
set hnsw.iterative_scan = strict_order
set hnsw.max_scan_tuples = 200000
set hnsw.scan_mem_multiplier = 4
-- The planner cannot price the subselects, and takes a full scan for cheap.
set enable_seqscan = off
set enable_sort = off
as $$
declare
    width int := cardinality(queries);
    share int := ceil(k::float8 / width);
    statement text := walk_statement(space, path, exclude);
    walks refcursor[];
    walk refcursor;
    heads text[];
    tops real[];
    head text;
    top real;
    best int;
    found int := 0;
    wanted int := k;
    different int;
begin
    -- At least what one walk gives on average to a merged list; three times what is beyond 100, for the far end of a
    -- long list is the least exact part of a walk; and some room for what is excluded, which lies near the interests.
    perform set_config('hnsw.ef_search', least(1000, greatest(ef_search, share + 2 * greatest(0, share - 100))
                                                     + least(cardinality(exclude), share / 4))::text, true);
    for n in 1..width loop
        walk := null;
        open walk no scroll for execute statement using queries[n], exclude, path;
        walks[n] := walk;
        fetch walk into head, top;
        heads[n] := head;
        tops[n] := top;
    end loop;
    loop
        best := null;
        top := null;
        for n in 1..width loop
            if tops[n] > top or (top is null and tops[n] is not null) then
                best := n;
                top := tops[n];
            end if;
        end loop;
        exit when best is null;
        found := found + 1;
        interests[found] := best;
        item_ids[found] := heads[best];
        scores[found] := top;
        if found = wanted then
            select count(distinct i collate "C") into different from unnest(item_ids) i;
            exit when different = k;
            wanted := wanted + k - different;
        end if;
        walk := walks[best];
        fetch walk into head, top;
        heads[best] := head;
        tops[best] := top;
    end loop;
    foreach walk in array walks loop
        close walk;
    end loop;
    if different is distinct from k then
        interests := null;
        item_ids := null;
        scores := null;
    end if;
end $$;

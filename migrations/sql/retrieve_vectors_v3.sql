-- Candidates for given interest vectors: THE retrieval, behind every other function here, and the truth behind HTTP.
-- Per-interest nearest items, filtered before the cut, merged, deduplicated. Score: inner product, higher is better.
-- allow: only these items, null for all. exact: scan, whatever it costs. ef_search: how wide to search the index; null:
-- as the generation was tuned, and not at all in a catalogue of 20,000 items (EXACT_ITEMS), where a scan is as fast. The
-- content encoders' own spaces are wider: their indexes are searched from 2,000 items on.
create or replace function retrieve_vectors(
    interests halfvec[], weights real[] default null, k int default 100, filter jsonb default '{}',
    exclude text[] default '{}', merge text default 'max', space text default 'item', generation bigint default null,
    allow text[] default null, diversity jsonb default null, exact bool default false, ef_search int default null)
returns setof candidate
language plpgsql stable
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    asked alias for k;
    served record;
    source space_source;
    width int := coalesce(cardinality(interests), 0);
    shares real[] := coalesce(weights, array_fill(1::real, array[width]));
    path jsonpath := filter_path(filter);
    banned text[] := coalesce(exclude, '{}');
    items bigint;
    members text[];
    numbers int[];
    ids text[];
    scores real[];
begin
    perform check_question(asked, merge, diversity);
    served := served_generation(retrieve_vectors.generation);
    source := searched_space(served.served, served.dim, space);
    perform check_vectors(interests, shares, source.dim, space, merge = 'sum');
    if merge = 'sum' then
        interests := array[summed(interests, shares)];
        shares := '{1}';
        merge := 'max';
    end if;
    select greatest(reltuples, 0)::bigint into items
    from pg_class where oid = ('item_embeddings_g' || served.served)::regclass;
    if path is not null or allow is not null then
        members := filter_members(path, filter, allow, greatest(2000, sqrt(12.0 * asked * items)::int));
    end if;
    -- A question unlike those that the search was tuned with may not leave the part of the graph that it enters.
    if members is null and not exact and source.walkable
       and items - cardinality(banned) > (case when retrieve_vectors.ef_search is null
                                                    and source.relation <> 'content_embeddings' then 20000 else 2000 end) then
        if merge = 'max' then
            select l.interests, l.item_ids, l.scores into numbers, ids, scores
            from walked_in_turn(source, interests, asked,
                                coalesce(retrieve_vectors.ef_search, served.ef_search), path, banned) l;
        else
            select l.interests, l.item_ids, l.scores into numbers, ids, scores
            from walked_lists(source, interests, asked, path, banned) l;
        end if;
    end if;
    -- A short answer of a walk may mean that the graph ran dry: only a scan can tell.
    if ids is null then
        select array_agg(l.interest), array_agg(l.item_id), array_agg(l.score) into numbers, ids, scores
        from scanned_lists(source, interests, asked, path, banned, members) l;
    end if;
    return query
    select m.item_id, m.score, m.rank, (m.interest - 1)::smallint, m.interest_rank, served.served,
           array(select (n - 1)::smallint from unnest(m.found_by) n), m.found_ranks, m.found_scores
    from merge_lists(numbers, ids, scores, shares, asked, merge, diversity) m;
end $$;

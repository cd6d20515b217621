-- Candidates for given interest vectors: THE retrieval, behind every other function here and behind HTTP.
-- Per-interest nearest items, filtered before the cut, merged, deduplicated. Score: inner product, higher is better.
create function retrieve_vectors(
    interests halfvec[], weights real[] default null, k int default 100, filter jsonb default '{}',
    exclude text[] default '{}', merge text default 'max', space text default 'item', generation bigint default null)
returns setof candidate
language plpgsql stable
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    asked alias for k;
    served record;
    space_column text := case retrieve_vectors.space
        when 'item' then 'embedding' when 'content' then 'content_embedding' when 'id' then 'id_embedding' end;
    width int := coalesce(cardinality(interests), 0);
    shares real[] := coalesce(weights, array_fill(1::real, array[width]));
    path jsonpath := filter_path(filter);
    banned text[] := coalesce(exclude, '{}');
    items bigint;
    depth int;
    members text[];
    exact bool;
    numbers int[];
    ids text[];
    scores real[];
    deeper int[];
begin
    perform check_question(k, merge, space);
    served := served_generation(retrieve_vectors.generation);
    perform check_vectors(interests, shares, served.dim);
    select case when reltuples >= 0 then reltuples::bigint end into items
    from pg_class where oid = ('item_embeddings_g' || served.served)::regclass;
    depth := first_depth(asked, width, merge);
    if path is not null then
        members := filter_members(path, filter, greatest(2000, sqrt(5.0 * width * depth * coalesce(items, 0))::int));
    end if;
    exact := members is not null or coalesce(items, 0) - cardinality(banned) <= 2000;
    if exact then
        depth := asked;
    end if;
    select array_agg(l.interest), array_agg(l.item_id), array_agg(l.score) into numbers, ids, scores
    from interest_lists(served.served, served.dim, space_column, interests, depth, path, banned, exact, members) l;
    if depth < asked then
        deeper := unfinished_interests(numbers, ids, scores, depth, asked);
        if deeper <> '{}' then
            -- What the first walk found of these interests comes again, and the merge takes each pair once.
            select array_agg(l.interest), array_agg(l.item_id), array_agg(l.score) into numbers, ids, scores from (
                select n as interest, i as item_id, s as score from unnest(numbers, ids, scores) f (n, i, s)
                where n <> all (deeper)
                union all
                select deeper[d.interest], d.item_id, d.score
                from interest_lists(served.served, served.dim, space_column,
                                    (select array_agg(interests[n] order by o) from unnest(deeper) with ordinality u (n, o)),
                                    asked, path, banned, false, null) d
            ) l;
        end if;
    end if;
    if not exact and (select count(distinct i) from unnest(ids) i) < asked then
        -- The graph ran dry: fewer than k items qualify, or the walk met its limit. Only a scan can tell.
        select array_agg(l.interest), array_agg(l.item_id), array_agg(l.score) into numbers, ids, scores
        from interest_lists(served.served, served.dim, space_column, interests, asked, path, banned, true, null) l;
    end if;
    return query
    select m.item_id, m.score, m.rank, (m.interest - 1)::smallint, m.interest_rank, served.served
    from merge_lists(numbers, ids, scores, shares, asked, merge) m;
end $$;

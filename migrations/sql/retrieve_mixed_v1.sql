-- Candidates for interest vectors and one vector of a content space (a text, a picture, another item), best first.
-- score = mix · cosine with that vector + (1 - mix) · best score of an interest; an item without such content has 0 for
-- the first. Weighed are the best max(500, 2 · k) of either side; interest, its rank and found_by are those among them.
create or replace function retrieve_mixed(
    interests halfvec[], question halfvec, mix real default 0.5, space text default 'text', k int default 100,
    filter jsonb default '{}', exclude text[] default '{}', generation bigint default null, allow text[] default null)
returns setof candidate
language plpgsql stable
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    asked alias for k;
    served record;
    depth int;
    pool text[];
begin
    perform check_question(asked, 'max');
    if mix is null or mix not between 0 and 1 then
        raise exception 'mix is %, and must be from 0 to 1', coalesce(mix::text, 'null') using errcode = 'PT006';
    end if;
    served := served_generation(retrieve_mixed.generation);
    depth := least(1000, greatest(500, 2 * asked));
    select coalesce(array_agg(distinct p.item_id), '{}') into pool from (
        select r.item_id from retrieve_vectors(interests, null, depth, filter, exclude, 'max', 'item', served.served, allow) r
        union all
        select r.item_id from retrieve_vectors(array[question], null, depth, filter, exclude, 'max', space, served.served,
                                               allow) r
    ) p;
    return query
    with liked as materialized (
        select b.* from (
            select array_agg(l.interest) as numbers, array_agg(l.item_id) as ids, array_agg(l.score) as scores
            from scanned_lists(searched_space(served.served, served.dim, 'item'), interests, cardinality(pool), null, '{}',
                               pool) l
        ) lists cross join lateral best_of_lists(lists.numbers, lists.ids, lists.scores) b
    ), said as materialized (
        select l.item_id, l.score
        from scanned_lists(searched_space(served.served, served.dim, space), array[question], cardinality(pool), null, '{}',
                           pool) l
    ), mixed as (
        select b.*, (mix::float8 * coalesce(w.score, 0)::float8 + (1 - mix::float8) * b.s::float8)::real as total
        from liked b left join said w on w.item_id = b.i
    )
    select m.i, m.total, row_number() over (order by m.total desc, m.i collate "C")::int, (m.n - 1)::smallint, m.r,
           served.served, array(select (n - 1)::smallint from unnest(m.ns) n), m.rs, m.ss
    from mixed m order by m.total desc, m.i collate "C" limit asked;
end $$;

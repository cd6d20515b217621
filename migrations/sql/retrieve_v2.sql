-- Candidates for a user from the interests stored with the live generation, best first. filter: a JSON object over
-- attributes. exclude_seen: leaves out what the user interacted with. merge: max, quota, rrf, soft, or diverse, which
-- takes diversity: {"attribute": "genres", "weight": 0.05}. exclude: never these items. allow: only these, null for all.
create or replace function retrieve(
    user_id text, k int default 100, filter jsonb default '{}', exclude_seen bool default true,
    merge text default 'max', exclude text[] default '{}', allow text[] default null, diversity jsonb default null)
returns setof candidate
language plpgsql stable
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    served record := served_generation();
    stored record;
    banned text[] := coalesce(exclude, '{}');
begin
    select array_agg(u.embedding order by u.interest) as vectors, array_agg(u.weight order by u.interest) as weights,
           array_agg(u.interest order by u.interest) as numbers
    into stored from user_interests u where u.generation = served.served and u.user_id = retrieve.user_id;
    if stored.vectors is null then
        perform raise_unknown_user(retrieve.user_id, served.served);
    end if;
    if exclude_seen then
        banned := banned || seen_items(retrieve.user_id);
    end if;
    return query
    select r.item_id, r.score, r.rank, stored.numbers[r.interest + 1], r.interest_rank, r.generation,
           array(select stored.numbers[n + 1] from unnest(r.found_by) n), r.found_ranks, r.found_scores
    from retrieve_vectors(stored.vectors, stored.weights, retrieve.k, retrieve.filter, banned, retrieve.merge,
                          generation => served.served, allow => retrieve.allow, diversity => retrieve.diversity) r;
end $$;

create or replace function retrieve(
    user_id bigint, k int default 100, filter jsonb default '{}', exclude_seen bool default true,
    merge text default 'max', exclude text[] default '{}', allow text[] default null, diversity jsonb default null)
returns setof candidate
language sql stable
set search_path = polytower, public
as $$ select * from retrieve(user_id::text, k, filter, exclude_seen, merge, exclude, allow, diversity) $$;

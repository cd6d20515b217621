-- The generation to answer from: the live one, or the one that a request was pinned to and that still has its rows.
-- ef_search: what its build found to reach the recall objective (pipelines/generation/search_depth.py), else a cautious value.
create or replace function served_generation(generation bigint default null, out served bigint, out dim int, out ef_search int)
language plpgsql stable parallel safe
set search_path = polytower, public
as $$
#variable_conflict use_column
begin
    if served_generation.generation is null then
        select g.generation, g.dim, coalesce((g.quality #>> '{index,ef_search}')::int, 60)
        into served, dim, ef_search from generations g where g.state = 'live';
        if served is null then
            raise exception 'no generation is live' using errcode = 'PT001', hint = 'build one and promote it';
        end if;
        return;
    end if;
    select g.generation, g.dim, coalesce((g.quality #>> '{index,ef_search}')::int, 60) into served, dim, ef_search
    from generations g
    where g.generation = served_generation.generation and g.state in ('building', 'ready', 'live', 'retired')
      and to_regclass('item_embeddings_g' || g.generation) is not null;
    if served is null then
        raise exception 'generation % is not there to be served', served_generation.generation using errcode = 'PT013';
    end if;
end $$;

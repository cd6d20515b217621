-- Where the vectors of a space lie: item, content and id in the generation's partition; text, image and whatever other
-- content it was made of in content_embeddings, by the encoder that filled the generation, as content is now.
-- walkable: there is an HNSW index. Internal. Raises PT009.
create or replace function searched_space(generation bigint, dim int, space text) returns space_source
language plpgsql stable
set search_path = polytower, public
as $$
#variable_conflict use_column
declare
    space_column text := case searched_space.space
        when 'item' then 'embedding' when 'content' then 'content_embedding' when 'id' then 'id_embedding' end;
    encoders jsonb;
    raw record;
    walkable boolean;
begin
    if space_column is not null then
        return row('item_embeddings_g' || searched_space.generation, format('e.generation = %s', searched_space.generation),
                   space_column, searched_space.dim, true)::space_source;
    end if;
    select coalesce(g.config -> 'encoders', '{}') into encoders from generations g
    where g.generation = searched_space.generation;
    select c.modality, c.revision, c.dim into raw from content_encoders c
    where c.modality = searched_space.space and c.revision = encoders ->> searched_space.space;
    if raw.modality is null then
        raise exception 'generation % has no space "%"', searched_space.generation, left(searched_space.space, 200)
            using errcode = 'PT009', hint = concat_ws(', ', 'item, content, id',
                (select string_agg(m, ', ') from jsonb_object_keys(encoders) m));
    end if;
    select i.indisvalid into walkable from pg_index i
    where i.indexrelid = to_regclass(format('%I', concat_ws('_', 'content_embeddings', raw.modality, raw.revision, 'hnsw')));
    return row('content_embeddings', format('e.modality = %L and e.revision = %L', raw.modality, raw.revision),
               'embedding', raw.dim, coalesce(walkable, false))::space_source;
end $$;

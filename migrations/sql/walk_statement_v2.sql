-- The statement of one walk over the HNSW index of a space: item_id and score, nearest first, only qualifying items.
-- Its parameters: $1 the query vector, $2 the excluded ids, $3 the compiled filter. Internal: callers have checked all.
create or replace function walk_statement(space space_source, path jsonpath, exclude text[]) returns text
language plpgsql stable
set search_path = polytower, public
as $$
declare
    conditions text := space.condition;
begin
    if exclude <> '{}' then
        conditions := conditions || ' and e.item_id <> all ($2)';
    end if;
    -- Subselects, not joins: a join may be planned as a hash join, which loses the index's order.
    if path is not null then
        conditions := conditions
            || ' and (select i.available and i.attributes @@ $3 from items i where i.item_id = e.item_id)';
    elsif exists (select from items i where not i.available) then
        conditions := conditions
            || ' and (select true from items i where i.item_id = e.item_id and not i.available) is not true';
    end if;
    return format('select e.item_id, (-(e.%1$I::halfvec(%2$s) <#> $1))::real from %3$I e where %4$s'
                  ' order by e.%1$I::halfvec(%2$s) <#> $1', space.space_column, space.dim, space.relation, conditions);
end $$;

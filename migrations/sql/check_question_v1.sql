-- Refuses what no generation could answer.
create function check_question(k int, merge text, space text) returns void
language plpgsql immutable parallel safe
set search_path = polytower, public
as $$
begin
    if k is null or k not between 1 and 1000 then
        raise exception 'k is %, and must be from 1 to 1000', coalesce(k::text, 'null') using errcode = 'PT004';
    end if;
    if merge is null or merge not in ('max', 'quota', 'rrf') then
        raise exception 'no merge is called "%"', merge using errcode = 'PT010', hint = 'max, quota or rrf';
    end if;
    if space is null or space not in ('item', 'content', 'id') then
        raise exception 'no space is called "%"', space using errcode = 'PT009', hint = 'item, content or id';
    end if;
end $$;

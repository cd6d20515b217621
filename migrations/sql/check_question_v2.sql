-- Refuses what no generation could answer.
create or replace function check_question(k int, merge text, diversity jsonb default null) returns void
language plpgsql immutable parallel safe
set search_path = polytower, public
as $$
begin
    if k is null or k not between 1 and 1000 then
        raise exception 'k is %, and must be from 1 to 1000', coalesce(k::text, 'null') using errcode = 'PT004';
    end if;
    if merge is null or merge not in ('max', 'quota', 'rrf', 'soft', 'diverse', 'sum') then
        raise exception 'no merge is called "%"', merge using errcode = 'PT010', hint = 'max, quota, rrf, soft, diverse or sum';
    end if;
    if (merge = 'diverse') is distinct from (diversity is not null) then
        raise exception 'merge "diverse" and a diversity go together' using errcode = 'PT014';
    end if;
    if diversity is not null and not coalesce(
        jsonb_typeof(diversity) = 'object'
        and diversity - array['attribute', 'weight'] = '{}'
        and jsonb_typeof(diversity -> 'attribute') = 'string'
        and jsonb_path_exists(diversity, 'strict $.weight ? (@ >= 0 && @ <= 1000)'), false) then
        raise exception 'the diversity is not readable: %', left(diversity::text, 80)
            using errcode = 'PT014', hint = '{"attribute": "genres", "weight": 0.05}, the weight from 0 to 1000';
    end if;
end $$;

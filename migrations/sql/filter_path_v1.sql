-- Compiles a filter over attributes into one jsonpath predicate (for items.attributes @@ path); null when it is empty.
-- Keys and values travel as JSON strings and numbers, which jsonpath reads as literals: nothing in them is ever code.
create or replace function filter_path(filter jsonb) returns jsonpath
language plpgsql immutable parallel safe
set search_path = polytower, public
as $$
declare
    key text;
    wanted jsonb;
    operator text;
    operand jsonb;
    attribute text;
    clauses text[] := '{}';
    -- gte and lt together must hold for one and the same element of a list
    ranges text[];
begin
    if filter is null or filter = '{}' then
        return null;
    end if;
    if jsonb_typeof(filter) <> 'object' then
        raise exception 'the filter is not a JSON object: %', left(filter::text, 80) using errcode = 'PT008';
    end if;
    for key, wanted in select * from jsonb_each(filter) loop
        attribute := '$.' || to_jsonb(key)::text;
        if jsonb_typeof(wanted) = 'array' then
            raise exception 'the filter on "%" is a list: write {"any": [...]} or {"all": [...]}', key using errcode = 'PT008';
        elsif jsonb_typeof(wanted) <> 'object' then
            clauses := clauses || format('%s == %s', attribute, wanted::text);
            continue;
        elsif wanted = '{}' then
            raise exception 'the filter on "%" says nothing', key using errcode = 'PT008';
        end if;
        ranges := '{}';
        for operator, operand in select * from jsonb_each(wanted) loop
            if operator in ('any', 'all') and jsonb_typeof(operand) = 'array' and operand <> '[]'
               and not jsonb_path_exists(operand, 'strict $[*] ? (@.type() == "array" || @.type() == "object")') then
                clauses := clauses || (
                    select '(' || string_agg(format('%s == %s', attribute, value::text),
                                             case operator when 'any' then ' || ' else ' && ' end) || ')'
                    from jsonb_array_elements(operand));
            elsif operator in ('gt', 'gte', 'lt', 'lte') and jsonb_typeof(operand) in ('number', 'string') then
                ranges := ranges || format('@ %s %s',
                    case operator when 'gt' then '>' when 'gte' then '>=' when 'lt' then '<' else '<=' end, operand::text);
            else
                raise exception 'the filter on "%" cannot read "%": %', key, operator, left(operand::text, 80)
                    using errcode = 'PT008',
                          hint = 'any and all take a list of values; gt, gte, lt and lte take a number or a string';
            end if;
        end loop;
        if ranges <> '{}' then
            clauses := clauses || format('exists(%s[*] ? (%s))', attribute, array_to_string(ranges, ' && '));
        end if;
    end loop;
    return array_to_string(clauses, ' && ')::jsonpath;
end $$;

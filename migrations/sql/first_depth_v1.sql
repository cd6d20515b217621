-- How many items to ask of each interest at first. Only `max` can tell afterwards whether that was enough.
create function first_depth(k int, interests int, merge text) returns int
language sql immutable parallel safe
return case when merge = 'max' and interests > 1 and k >= 10
            then least(k, greatest(10, ceil(1.6 * k / interests)::int)) else k end;

-- How many items to ask of each interest at first. Only `max` can tell afterwards whether that was enough. Measured on
-- 200k × 64, four interests, k 100: a walk to depth 20 / 40 / 60 / 100 costs 3.0 / 4.3 / 5.2 / 6.8 ms of CPU, and another
-- round about 3 ms: it pays to start deep enough that most questions need no second.
create function first_depth(k int, interests int, merge text) returns int
language sql immutable parallel safe
return case when merge = 'max' and interests > 1 and k >= 10
            then least(k, greatest(10, ceil(2.4 * k / interests)::int)) else k end;

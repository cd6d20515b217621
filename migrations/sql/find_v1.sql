-- Items whose title or description holds all the words; best first. Titles count most. `or`, -word and "a phrase" work as
-- in web searches. Every item is read. By meaning, not by words: nearest() and HTTP's questions by text.
create or replace function find(words text, k int default 10)
returns table (item_id text, title text, score real, rank int)
language sql stable
set search_path = polytower, public
as $$
    select f.item_id, f.title, f.score, row_number() over (order by f.score desc, length(f.title), f.item_id collate "C")::int
    from (
        select i.item_id, i.title, ts_rank(t.words, q.words, 1) as score
        from websearch_to_tsquery('simple', find.words) q (words)
        cross join items i
        cross join lateral (select setweight(to_tsvector('simple', coalesce(i.title, '')), 'A')
                                   || setweight(to_tsvector('simple', coalesce(i.description, '')), 'D')) t (words)
        where t.words @@ q.words
    ) f
    order by f.score desc, length(f.title), f.item_id collate "C" limit k
$$;

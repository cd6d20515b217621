-- Under which key a query's embedding is kept: a hash of its text without blank edges; null for no query, or blanks.
create or replace function query_key(query text) returns text immutable strict parallel safe language sql as $$
    -- the characters of feature_repo.modalities.BLANK
    select md5(nullif(btrim(query, E'\t\n\x0b\f\r\x1c\x1d\x1e\x1f \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005'
        '\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000\u200b\u2060\ufeff'), ''))
$$;

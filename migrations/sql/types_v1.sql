-- What retrieval answers with. Types rather than output columns: an argument may then bear the name of a column.
create type candidate as (
    item_id text, score real, rank int, interest smallint, interest_rank int, generation bigint);
create type neighbour as (item_id text, score real, rank int, generation bigint);

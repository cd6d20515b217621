"""Fills an index in memory from Postgres, in one snapshot.

Postgres packs columns into blocks of bytes, and numpy reads them where they lie: the interpreter, which has requests to
answer meanwhile, does next to nothing per item.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import IsolationLevel

from polytower.postgres import OPTIONS, open_session
from serving.memory.item_index import ItemIndex
from serving.memory.packed_strings import Ids, Texts
from serving.memory.postings import Postings

# An attribute with more different values is filtered by Postgres.
MAX_VALUES = 20_000
# What an item takes beside its vector, ids and titles of usual length included.
ITEM_BYTES = 160
# Items that Postgres packs into one row, and such rows fetched at a time.
BLOCK, BLOCK_BATCH = 8192, 4

LIVE = """
select g.generation, g.dim, (select version from item_version limit 1) as version,
       (select greatest(reltuples, 0)::bigint from pg_class
        where oid = to_regclass('item_embeddings_g' || g.generation)) as items
from generations g where g.state = 'live' limit 1
"""

# Blocks of items in ascending order of the id's bytes. A vector is sent as its dimension, two unused bytes, its values.
BLOCKS = """
select string_agg(int4send(octet_length(m.item_id)), '' order by m.n) as id_lengths,
       string_agg(convert_to(m.item_id, 'UTF8'), '' order by m.n) as ids,
       string_agg(int4send(coalesce(octet_length(i.title), -1)), '' order by m.n) as title_lengths,
       string_agg(convert_to(coalesce(i.title, ''), 'UTF8'), '' order by m.n) as titles,
       string_agg(int4send((i.available is not false)::int), '' order by m.n) as available,
       string_agg(substr(halfvec_send(m.embedding), 5), '' order by m.n) as vectors
from (
    select e.item_id, e.embedding, row_number() over (order by e.item_id collate "C") - 1 as n
    from item_embeddings e where e.generation = %(generation)s
) m left join items i on i.item_id = m.item_id
group by m.n / %(block)s order by m.n / %(block)s
"""

# One row per attribute and value (JSON texts of scalars and of lists' elements). Beyond the values that are kept of an
# attribute comes one with value null.
POSTINGS = """
with members as (
    select item_id, row_number() over (order by item_id collate "C") - 1 as n
    from item_embeddings where generation = %(generation)s
), listed as (
    select a.key, v.value::text as value, m.n
    from members m
    join items i on i.item_id = m.item_id
    cross join lateral jsonb_each(i.attributes) a
    cross join lateral (
        select e.value from jsonb_array_elements(case jsonb_typeof(a.value) when 'array' then a.value else '[]' end) e
        union
        select a.value where jsonb_typeof(a.value) <> 'array'
    ) v
), counted as (
    select key, value, string_agg(int4send(n::int), '' order by n) as positions,
           row_number() over (partition by key) as number
    from listed group by key, value
)
select key, case when number <= %(values)s then value end as value, positions from counted
where number <= %(values)s + 1
"""

# Attributes that items have, but no value in them (empty lists).
EMPTY = """
select distinct key from item_embeddings e join items i on i.item_id = e.item_id
cross join lateral jsonb_object_keys(i.attributes) key where e.generation = %(generation)s limit 10000
"""


# Interests to tune the search with: by hash, so always the same ones.
SAMPLE = """
select string_agg(substr(halfvec_send(embedding), 5), '') from (
    select embedding from (
        select user_id, interest, embedding from user_interests where generation = %(generation)s limit 100000
    ) users order by md5(user_id), interest limit 128
) sample
"""


class TooLarge(Exception):  # noqa: N818 no error: SQL answers then
    """The live generation would not fit the memory that the index may take."""


def load(url: str, limit: int, kind: str | None = None) -> ItemIndex | None:
    """read() over a connection and a snapshot of its own."""
    try:
        with psycopg.connect(url, connect_timeout=5, **OPTIONS) as connection:
            open_session(connection)
            connection.isolation_level = IsolationLevel.REPEATABLE_READ
            return read(connection, limit, kind)
    finally:
        _give_back()


def _give_back() -> None:
    """Gives what a load has freed back to the system: glibc keeps it otherwise, twice the index itself."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def read(connection: psycopg.Connection[Any], limit: int, kind: str | None = None) -> ItemIndex | None:
    """The live generation as an index; None when there is none. Raises TooLarge beyond `limit` bytes.

    kind: of its vector index; None: by size.
    """
    live = connection.execute(LIVE).fetchone()
    if live is None:
        return None
    generation, dim, version, items = live
    expected = items * (2 * dim + ITEM_BYTES)
    if expected > limit:
        raise TooLarge(f"generation {generation} takes about {expected >> 20} MiB, more than {limit >> 20} MiB")
    blocks = list(_blocks(connection, generation))
    columns = [b"".join(column) for column in zip(*blocks, strict=True)] or [b""] * 6
    id_lengths, ids, title_lengths, titles, available, packed = columns
    del blocks, columns
    vectors = np.frombuffer(packed, ">f2").reshape(-1, dim).astype(np.float16)
    del packed
    postings = _postings(connection, generation, len(vectors))
    index = ItemIndex(
        generation,
        version,
        vectors,
        Ids(Texts(ids, _integers(id_lengths))),
        Texts(titles, _integers(title_lengths)),
        _integers(available).astype(bool),
        postings,
        _sample(connection, generation, dim),
        kind,
    )
    if index.bytes > limit:
        raise TooLarge(f"generation {generation} takes {index.bytes >> 20} MiB, more than {limit >> 20} MiB")
    return index


def _blocks(connection: psycopg.Connection[Any], generation: int) -> Iterator[tuple[bytes, ...]]:
    with connection.cursor("item_blocks", binary=True) as cursor:
        cursor.itersize = BLOCK_BATCH
        yield from cursor.execute(BLOCKS, {"generation": generation, "block": BLOCK})


def _postings(connection: psycopg.Connection[Any], generation: int, items: int) -> Postings:
    postings = Postings(items)
    with connection.cursor("item_postings", binary=True) as cursor:
        for key, value, positions in cursor.execute(POSTINGS, {"generation": generation, "values": MAX_VALUES}):
            if value is None:
                postings.leave_out(key)
            else:
                postings.add(key, value, _integers(positions))
    for (key,) in connection.execute(EMPTY, {"generation": generation}):
        postings.add_attribute(key)
    return postings


def _sample(connection: psycopg.Connection[Any], generation: int, dim: int) -> NDArray[np.float32]:
    row = connection.execute(SAMPLE, {"generation": generation}, binary=True).fetchone()
    packed = row[0] if row is not None else None
    return np.frombuffer(packed or b"", ">f2").reshape(-1, dim).astype(np.float32)


def _integers(packed: bytes) -> NDArray[np.int32]:
    return np.frombuffer(packed, ">i4").astype(np.int32)

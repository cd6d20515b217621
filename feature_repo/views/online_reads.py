"""How each feature view is read online: one query over our own tables, the newest row of each entity.

Every query starts from the wanted ids, numbered; each row says whose it is (`position`), so that the columns land in
the order of the request without a dictionary, and entities without a row leave a gap.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from feature_repo.columns import Kind
from feature_repo.schema import (
    ITEM_ATTRIBUTES_VIEW,
    ITEM_CONTENT_VIEW,
    ITEM_EMBEDDING_VIEW,
    ITEM_ID,
    ITEM_STATS_VIEW,
    USER_ID,
    USER_INTERESTS_VIEW,
    USER_SEQUENCE_VIEW,
    USER_STATS_VIEW,
)
from feature_repo.views.content_columns import sent_embeddings, with_embeddings


@dataclass(frozen=True)
class OnlineView:
    """One feature view online.

    key: the entity's column. rows: SQL that follows `from wanted` and joins the entity's newest row, if any.
    as_of: SQL of its timestamp. features: name → (SQL of the value, kind of the column).
    """

    key: LiteralString
    rows: LiteralString
    as_of: LiteralString
    features: dict[str, tuple[LiteralString, Kind]]


@dataclass(frozen=True)
class OnlineRead:
    """A question: N distinct ids, and features of one view."""

    view: str
    ids: Sequence[str]
    features: Sequence[str]


@dataclass(frozen=True)
class OnlineColumns:
    """The answer for N wanted entities, by column.

    as_ofs: N timestamps, None where the entity has no row. features: name → N values as read (columns.py decodes
    them by the feature's kind).
    """

    as_ofs: list[datetime | None]
    features: dict[str, list[Any]]


ONLINE_VIEWS: dict[str, OnlineView] = {
    USER_SEQUENCE_VIEW: OnlineView(
        key=USER_ID,
        rows="""cross join lateral (
            select * from user_sequences where user_id = wanted.id order by as_of desc limit 1
        ) as newest""",
        as_of="as_of",
        features={
            "item_ids": ("array_send(item_ids)", "texts"),
            "occurred_ats": ("array_send(occurred_ats)", "moments"),
            "kinds": ("array_send(kinds)", "texts"),
            "queries": ("array_send(queries)", "texts"),
        },
    ),
    USER_STATS_VIEW: OnlineView(
        key=USER_ID,
        rows="""cross join lateral (
            select * from user_stats where user_id = wanted.id order by as_of desc limit 1
        ) as newest""",
        as_of="as_of",
        features={
            "user_interactions": ("interactions", "integer"),
            "user_distinct_items": ("distinct_items", "integer"),
            "user_mean_value": ("mean_value", "number"),
            "user_first_at": ("feast.epoch_micros(first_at)", "moment"),
        },
    ),
    ITEM_STATS_VIEW: OnlineView(
        key=ITEM_ID,
        rows="""cross join lateral (
            select * from item_stats where item_id = wanted.id order by as_of desc limit 1
        ) as newest""",
        as_of="as_of",
        features={
            "item_interactions": ("interactions", "integer"),
            "item_distinct_users": ("distinct_users", "integer"),
            "item_mean_value": ("mean_value", "number"),
            "item_first_at": ("feast.epoch_micros(first_at)", "moment"),
        },
    ),
    ITEM_ATTRIBUTES_VIEW: OnlineView(
        key=ITEM_ID,
        rows="join items on item_id = wanted.id",
        as_of="updated_at",
        features={
            "title": ("title", "text"),
            "description": ("description", "text"),
            "available": ("available", "flag"),
            "attributes": ("attributes::text", "json"),
        },
    ),
    ITEM_CONTENT_VIEW: OnlineView(
        key=ITEM_ID,
        rows=with_embeddings(
            """cross join lateral (
            select max(encoded_at) as encoded_at, {embeddings}
            from content_embeddings
            join content_encoders using (modality, revision)
            where active and item_id = wanted.id
            having count(*) > 0
        ) as content"""
        ),
        as_of="encoded_at",
        features=sent_embeddings(),
    ),
    ITEM_EMBEDDING_VIEW: OnlineView(
        key=ITEM_ID,
        rows="""join item_embeddings on item_id = wanted.id
            and generation = (select generation from live_generation)""",
        as_of="(select live_from from promotions where live_until is null)",
        features={
            "embedding": ("halfvec_send(embedding)", "halves"),
            "content_embedding": ("halfvec_send(content_embedding)", "halves"),
            "id_embedding": ("halfvec_send(id_embedding)", "halves"),
            "embedding_generation": ("generation", "integer"),
        },
    ),
    USER_INTERESTS_VIEW: OnlineView(
        key=USER_ID,
        rows="""cross join lateral (
            select generation,
                   string_agg(substring(halfvec_send(embedding) from 5), ''::bytea order by interest) as bodies,
                   array_agg(weight order by interest) as weights,
                   count(*) as interest_count,
                   max(vector_dims(embedding))::bigint as interest_dim
            from user_interests
            where user_id = wanted.id and generation = (select generation from live_generation)
            group by generation
        ) as interests""",
        as_of="(select live_from from promotions where live_until is null)",
        features={
            # The header of halfvec_send is put back as four bytes that nobody reads.
            "interests": ("'\\x00000000'::bytea || bodies", "halves"),
            "interest_weights": ("weights", "reals"),
            "interest_count": ("interest_count", "integer"),
            "interest_dim": ("interest_dim", "integer"),
            "interests_generation": ("generation", "integer"),
        },
    ),
}


def read_columns(
    connection: psycopg.Connection[Any], reads: Sequence[OnlineRead], snapshot: str | None = None
) -> list[OnlineColumns]:
    """The newest values for each read, one query per view; entities without a row get None.

    snapshot: exported by another connection whose moment is to be seen; None: now.
    connection: not in a transaction; left as it was. All queries see the same moment: a promotion never falls between
    two views. They are sent at once, the transaction's beginning and end with them: Postgres works on the next view
    while this process decodes the one before.
    """
    with _autocommit(connection), connection.pipeline(), ExitStack() as stack:
        connection.execute("begin isolation level repeatable read, read only")
        if snapshot is not None:
            connection.execute(sql.SQL("set transaction snapshot {}").format(snapshot))
        cursors = [stack.enter_context(connection.cursor(binary=True)) for _ in reads]
        for cursor, read in zip(cursors, reads, strict=True):
            cursor.execute(query(read.view, tuple(read.features)), {"ids": list(read.ids)})
        connection.execute("commit")
        return [_columns(read, cursor.fetchall()) for cursor, read in zip(cursors, reads, strict=True)]


@contextmanager
def _autocommit(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Leaves BEGIN and COMMIT to the block; what a failure leaves open is rolled back."""
    before = connection.autocommit
    connection.autocommit = True
    try:
        yield
    finally:
        if not connection.closed:
            connection.rollback()
            connection.autocommit = before


def distinct(ids: Sequence[str]) -> tuple[list[str], list[int] | None]:
    """The distinct ids, and where among them the given ones are (None: they are the given ones)."""
    places = {each: place for place, each in enumerate(dict.fromkeys(ids))}
    return list(places), None if len(places) == len(ids) else [places[each] for each in ids]


def _columns(read: OnlineRead, rows: Sequence[tuple[Any, ...]]) -> OnlineColumns:
    ids, features = read.ids, read.features
    if not rows:
        return OnlineColumns([None] * len(ids), {name: [None] * len(ids) for name in features})
    positions, as_ofs, *raw = zip(*rows, strict=True)
    # Without gaps the rows may still come in another order than the request's.
    if positions == tuple(range(1, len(ids) + 1)):
        return OnlineColumns(list(as_ofs), dict(zip(features, map(list, raw), strict=True)))
    return OnlineColumns(
        _place(positions, as_ofs, len(ids)),
        {name: _place(positions, column, len(ids)) for name, column in zip(features, raw, strict=True)},
    )


@lru_cache
def query(view: str, features: tuple[str, ...]) -> bytes:
    """The statement that reads the features of the view; one answer per request shape, as composing costs a read."""
    plan = ONLINE_VIEWS[view]
    values = [sql.SQL(", ") + sql.SQL(plan.features[name][0]) for name in features]
    composed = sql.SQL(
        "with wanted as (select * from unnest(%(ids)b::text[]) with ordinality as wanted (id, position)) "
        "select position, {as_of}{values} from wanted {rows}"
    ).format(as_of=sql.SQL(plan.as_of), values=sql.Composed(values), rows=sql.SQL(plan.rows))
    return composed.as_bytes()


def _place(positions: Sequence[int], values: Sequence[Any], size: int) -> list[Any]:
    placed: list[Any] = [None] * size
    for position, value in zip(positions, values, strict=True):
        placed[position - 1] = value
    return placed

"""How feature views are read online: one query each over our own tables, the newest row of each entity.

Every query starts from the wanted ids, numbered; each row says whose it is (`position`), so that the columns land in
the order of the request without a dictionary, and entities without a row leave a gap.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import psycopg
from psycopg import sql

from feature_repo.views import VIEWS


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
    return VIEWS[view].online(features).as_bytes()


def _place(positions: Sequence[int], values: Sequence[Any], size: int) -> list[Any]:
    placed: list[Any] = [None] * size
    for position, value in zip(positions, values, strict=True):
        placed[position - 1] = value
    return placed

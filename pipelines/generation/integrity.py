"""Whether a generation belongs to the data beside it: ids both ways, times, weights, content of each modality. SQL."""

from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from pipelines.generation import lifecycle
from pipelines.generation.embedding_gates import ENOUGH, Floats, Gate, mean_cosine
from pipelines.item_content import content_of

SAMPLE = 2_000
# What may be deleted between the reading of the data and the measuring.
STRAY = 0.001

GHOSTS = """
select (select count(*) from item_embeddings e
        where generation = %(generation)s and not exists (select from items i where i.item_id = e.item_id)),
       (select count(*) from item_embeddings where generation = %(generation)s),
       (select count(*) from placed where not exists (select from interactions i where i.user_id = placed.user_id)
            and not exists (select from users u where u.user_id = placed.user_id)),
       (select count(*) from placed)
"""
PLACED = """
with placed as (
    select user_id, min(as_of) as as_of, max(events) as known, abs(sum(weight::float8) - 1) as apart,
           bool_or(weight = 'NaN' or weight < 0) as broken
    from user_interests where generation = %(generation)s group by user_id
)
"""
# Only of users of whom nothing arrived since: the newest event is then the one that the interests know.
TIMES = """
, newest as (
    select user_id, count(*) as events, max(occurred_at) as at from interactions join items using (item_id)
    where occurred_at < %(before)s::timestamptz group by user_id
)
select count(*) filter (where as_of <> coalesce(at, 'epoch')), count(*)
from placed left join newest using (user_id)
where known is null or known = coalesce(events, 0)
"""
FIRST_INTERESTS = """
select embedding from user_interests where generation = %(generation)s and interest = (
    select min(interest) from user_interests where generation = %(generation)s)
order by md5(user_id) limit %(sample)s
"""
WEIGHTS = """
select max(case when broken then 'Infinity'::float8 else apart end) from placed
"""

INTEGRITY_GATES = (
    "ghost_items", "ghost_users", "as_of_error", "interest_weights", "interest_variety", "content_placed",
)  # fmt: skip


def integrity_gates(connection: psycopg.Connection[Any], generation: int) -> list[Gate]:
    """The gates, in the order of INTEGRITY_GATES."""
    before = lifecycle.get(connection, generation).trained_before or "infinity"
    values = {"generation": generation, "before": before}
    ghosts, items, strangers, users = _row(connection, PLACED + GHOSTS, values)
    wrong, known = _row(connection, PLACED + TIMES, values)
    (apart,) = _row(connection, PLACED + WEIGHTS, values)
    first = connection.execute(FIRST_INTERESTS, {**values, "sample": SAMPLE}, binary=True).fetchall()
    vectors: Floats = np.zeros((0, 1), np.float32)
    if first:
        vectors = np.stack([row[0].to_numpy() for row in first]).astype(np.float32)
    return [
        Gate("ghost_items", ghosts / items if items else None, STRAY, "at most"),
        Gate("ghost_users", strangers / users if users else None, STRAY, "at most"),
        Gate("as_of_error", wrong / known if known else None, STRAY, "at most"),
        Gate("interest_weights", apart, 0.01, "at most"),
        Gate("interest_variety", mean_cosine(vectors) if len(vectors) >= ENOUGH else None, 0.99, "at most"),
        Gate("content_placed", _content_placed(connection, generation), 0.99, "at least"),
    ]


def _content_placed(connection: psycopg.Connection[Any], generation: int) -> float | None:
    """Of each modality that the generation was built with, the share of its items with a content embedding; the least.

    None where the generation was built without content.
    """
    encoders = lifecycle.get(connection, generation).config.get("encoders", {})
    shares = []
    for name, revision in encoders.items():
        statement = sql.SQL(
            """select count(e.content_embedding), count(*) from ({content}) as c
               join content_embeddings v on v.item_id = c.item_id and modality = %(modality)s
                    and revision = %(revision)s
               left join item_embeddings e on e.generation = %(generation)s and e.item_id = c.item_id"""
        ).format(content=content_of(name))
        values = {"modality": name, "revision": revision, "generation": generation}
        placed, encoded = _row(connection, statement, values)
        if encoded:
            shares.append(placed / encoded)
    return min(shares) if shares else None


def _row(connection: psycopg.Connection[Any], query: Any, parameters: dict[str, Any]) -> tuple[Any, ...]:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return tuple(row)

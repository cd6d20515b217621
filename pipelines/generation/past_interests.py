"""The interests that a generation would have found in users' events before a moment: for training sets of the past.

A stored interest is as old as its generation. What the service answers with is newer: it runs the user tower over the
events so far. This does the same for rows of the past, so that a ranker learns from what it will be given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from encoders.catalogue import FloatArray, Histories
from encoders.content.attributes import user_vectors
from pipelines.generation import lifecycle
from pipelines.generation.stored_towers import event_rows, with_queries
from polytower.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from encoders.towers.model import Reader

# Rows whose events are read and go through the tower together.
ROW_CHUNK = 1024

EVENTS = """
select events.item_ids, events.times, coalesce(users.attributes, '{}'), events.query_keys
from unnest(%(user_ids)s::text[], %(moments)s::timestamptz[]) with ordinality as asked (user_id, moment, place)
cross join lateral (
    select array_agg(item_id order by occurred_at, position) as item_ids,
           array_agg((extract(epoch from occurred_at) * 1000000)::bigint order by occurred_at, position) as times,
           array_agg(query_key(query) order by occurred_at, position) as query_keys
    from (
        select i.item_id, i.occurred_at, i.position, i.query
        from interactions i
        join item_embeddings e on e.generation = %(generation)s and e.item_id = i.item_id
        where i.user_id = asked.user_id and i.occurred_at < asked.moment
        order by i.occurred_at desc, i.position desc limit %(length)s
    ) newest
) events
left join users on users.user_id = asked.user_id
order by asked.place
"""


@dataclass(frozen=True, eq=False)
class PastInterests:
    """vectors: float32 [N, K, D], unit rows; weights: float32 [N, K]. Zeros in a row about whom nothing was known."""

    vectors: FloatArray
    weights: FloatArray


def past_interests(
    connection: psycopg.Connection[Any], generation: int, user_ids: Sequence[str], moments: Sequence[datetime]
) -> PastInterests:
    """N rows (user, moment): the generation's user tower over the newest events strictly before the moment.

    Raises UserError for a generation that may know more than a moment does: one that was not trained before it.
    """
    found = lifecycle.get(connection, generation)
    if found.trained_before is None or any(moment < found.trained_before for moment in moments):
        raise UserError(
            f"generation {generation} was trained on events "
            + (f"up to {found.trained_before.isoformat()}" if found.trained_before else "of all times")
            + ": it would tell an earlier moment what came later; `polytower materialize --before` makes one for it"
        )
    tower = _tower(connection, generation)
    config = tower.config
    vectors = np.zeros((len(user_ids), config.interests, config.dim), np.float32)
    weights = np.zeros(vectors.shape[:2], np.float32)
    for start in range(0, len(user_ids), ROW_CHUNK):
        part = slice(start, start + ROW_CHUNK)
        vectors[part], weights[part] = _forward(connection, generation, tower, user_ids[part], moments[part])
    return PastInterests(vectors, weights)


def with_past_interests(connection: psycopg.Connection[Any], features: "pd.DataFrame") -> "pd.DataFrame":
    """A backfilled training set whose `interests` and `interest_weights` are those of each row's own moment.

    features: what Feast answered, with user_id, event_timestamp and the features of the view `user_interests`; the
    generation stays as it is. Rows without a generation, or without any event before, keep their nulls.
    """
    answer = features.copy()
    columns = {name: answer[name].astype(object).to_numpy() for name in ("interests", "interest_weights")}
    counts = answer["interest_count"].to_numpy(dtype=float, na_value=np.nan)
    numbers = answer["interests_generation"].to_numpy(dtype=float, na_value=np.nan)
    for number in np.unique(numbers[~np.isnan(numbers)]):
        places = np.flatnonzero(numbers == number)
        rows = answer.iloc[places]
        moments = [moment.to_pydatetime() for moment in rows["event_timestamp"]]
        found = past_interests(connection, int(number), list(rows["user_id"]), moments)
        for place, vectors_KD, weights_K in zip(places, found.vectors, found.weights, strict=True):
            used = weights_K > 0
            columns["interests"][place] = vectors_KD[used].ravel().tolist()
            columns["interest_weights"][place] = weights_K[used].tolist()
            counts[place] = used.sum()
    return answer.assign(**columns, interest_count=counts)


def _tower(connection: psycopg.Connection[Any], generation: int) -> "Reader":
    from encoders.training.checkpoint import load_user_tower

    row = connection.execute(
        "select weights, config from towers where generation = %s and part = 'user_tower'", [generation]
    ).fetchone()
    if row is None:
        raise UserError(f"generation {generation} was dropped: its user tower is gone")
    return load_user_tower(row[0], row[1])


def _forward(
    connection: psycopg.Connection[Any],
    generation: int,
    tower: "Reader",
    user_ids: Sequence[str],
    moments: Sequence[datetime],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    import torch
    from torch.nn import functional as F

    from encoders.evaluation.evaluate import context_of, padded

    asked = {"user_ids": list(user_ids), "moments": list(moments), "generation": generation}
    events = connection.execute(EVENTS, {**asked, "length": tower.config.history}).fetchall()
    known_items = event_rows(connection, generation, tower, {item for row in events for item in row[0] or ()})
    items = np.stack([np.zeros(tower.width, np.float32), *known_items.values()])
    index = {item_id: place for place, item_id in enumerate(known_items, 1)}
    histories = _histories(user_ids, events, index, tower.config.user_attributes)
    histories = with_queries(connection, generation, tower, histories, [key for row in events for key in row[3] or ()])
    rows_BT, mask_BT = padded(histories, tower.config.history)
    with torch.no_grad():
        looked_up_BTD = F.embedding(rows_BT, torch.from_numpy(items))
        found = tower.interests(looked_up_BTD, mask_BT, context_of(histories, tower.config))
    known = histories.lengths > 0
    if histories.attributes is not None:
        known |= histories.attributes.any(axis=1)
    return found.vectors.numpy() * known[:, None, None], found.weights.numpy() * known[:, None]


def _histories(
    user_ids: Sequence[str], events: Sequence[tuple[Any, ...]], index: Mapping[str, int], width: int
) -> Histories:
    lengths = [len(item_ids or ()) for item_ids, *_ in events]
    return Histories(
        list(user_ids),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array([index.get(item_id, 0) for item_ids, *_ in events for item_id in item_ids or ()], np.int64),
        np.array([moment for _, times, *_ in events for moment in times or ()], np.int64),
        user_vectors([attributes for _, _, attributes, _ in events], width) if width else None,
    )

"""How wide the index has to be searched for a recall objective: measured when a generation is built, kept with it.

Questions are users' interests, K at a time, as serving asks them; truth is a scan of what is stored, for all of them
at once. Most questions are answered whole at any width, and a few lose a whole interest: a walk that enters the wrong
part of the graph does not get out. So the mean of a few questions says little (200k items, 64 dimensions, ef_search 40:
a standard deviation of .05 to .11 for one question), and the mean alone must not decide.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# What serving promises of the merged 100, with 95 % certainty, and what the sample itself has to reach.
PROMISE, OBJECTIVE = 0.97, 0.98
CERTAIN = 1.64  # standard errors, one-sided
K = 100
USERS = 256
# Items scored at once.
BLOCK = 4096
# Widths tried, in order (hnsw.ef_search); the first that reaches the objective is taken.
WIDTHS = (20, 30, 40, 60, 80, 120, 160, 240, 400)

# Who is asked first, then their vectors: those of all users would be sorted otherwise.
SAMPLE = """
with chosen as (
    select user_id from user_interests where generation = %(generation)s
    group by user_id order by md5(user_id) limit %(users)s
)
select array_agg(u.embedding order by u.interest) as interests
from user_interests u join chosen using (user_id) where u.generation = %(generation)s
group by u.user_id order by md5(u.user_id)
"""
ITEMS = """
select e.embedding from item_embeddings e
where e.generation = %(generation)s and not exists (select from items i where i.item_id = e.item_id and not i.available)
"""
SEARCH = """
select r.score from retrieve_vectors(%(interests)s, k => %(k)s, generation => %(generation)s,
                                     ef_search => %(ef_search)s) r
order by r.rank limit %(k)s
"""


def tune(connection: psycopg.Connection[Any], generation: int) -> dict[str, Any]:
    """What to keep in the generation's quality report as `index`: ef_search, the recall that it reached and its error.

    Where no width reaches the objective, the widest one stays. Empty where there are no users to ask for.
    """
    sample = [row[0] for row in connection.execute(SAMPLE, {"generation": generation, "users": USERS}).fetchall()]
    if not sample:
        return {}
    bars = last_scores(sample, _items(connection, generation))
    for width in WIDTHS:
        recalls = [_recall(connection, generation, asked, width, bar) for asked, bar in zip(sample, bars, strict=True)]
        if enough(recalls):
            break
    return {
        "ef_search": width,
        "recall": round(float(np.mean(recalls)), 4),
        "error": round(standard_error(recalls), 4),
        "objective": OBJECTIVE,
        "questions": len(sample),
        "k": K,
    }


def enough(recalls: Sequence[float]) -> bool:
    """Whether these questions say that the objective is reached, and that fresh ones would be answered as promised."""
    mean = float(np.mean(recalls))
    return mean >= OBJECTIVE and mean - CERTAIN * standard_error(recalls) >= PROMISE


def standard_error(recalls: Sequence[float]) -> float:
    """Of the mean."""
    return float(np.std(recalls)) / math.sqrt(max(1, len(recalls) - 1))


def last_scores(sample: Sequence[Sequence[Any]], items: Iterator[Floats], k: int = K) -> list[float]:
    """The score of the k-th best item (of the last one, where there are fewer) for each question of several interests.

    sample: halfvecs, as Postgres sends them. items: blocks [V, D].
    """
    interests_ID = np.stack([vector.to_numpy() for asked in sample for vector in asked]).astype(np.float32)
    firsts = np.cumsum([0, *map(len, sample)])[:-1]
    best_QK = np.empty((len(sample), 0), np.float32)
    for block_VD in items:
        scores_QV = np.maximum.reduceat(interests_ID @ block_VD.T, firsts, axis=0)
        best_QK = np.concatenate([best_QK, scores_QV], axis=1)
        if best_QK.shape[1] > k:
            best_QK = np.partition(best_QK, -k, axis=1)[:, -k:]
    return [float(bar) for bar in best_QK.min(axis=1, initial=np.inf)]


def _items(connection: psycopg.Connection[Any], generation: int) -> Iterator[Floats]:
    with connection.cursor("recall_items", binary=True) as cursor:
        cursor.execute(ITEMS, {"generation": generation})
        while block := cursor.fetchmany(BLOCK):
            yield np.stack([vector.to_numpy() for (vector,) in block]).astype(np.float32)


def _recall(
    connection: psycopg.Connection[Any], generation: int, interests: list[Any], width: int, bar: float
) -> float:
    """Share of the true answer that was found. By score, so that one of two equal items is as good as the other."""
    parameters = {"interests": interests, "k": K, "generation": generation, "ef_search": width}
    found = [row[0] for row in connection.execute(SEARCH, parameters).fetchall()]
    # The two add in another order: a rounding apart is equal.
    return sum(score >= bar - 1e-5 for score in found) / len(found) if found else 1.0

"""How wide the index has to be searched for a recall objective: measured when a generation is built, kept with it.

Questions are users' interests, K at a time, as serving asks them; truth is the exact scan by the same SQL function.
"""

from typing import Any

import psycopg

# One above what serving promises (recall .97 of the merged 100): a sample of users is not all users.
OBJECTIVE = 0.98
K = 100
USERS = 32
# Widths tried, in order (hnsw.ef_search); the first that reaches the objective is taken.
WIDTHS = (20, 30, 40, 60, 80, 120, 160, 240, 400)

SAMPLE = """
select array_agg(u.embedding order by u.interest) as interests
from user_interests u where u.generation = %(generation)s
group by u.user_id order by md5(u.user_id) limit %(users)s
"""
SEARCH = """
select r.score from retrieve_vectors(%(interests)s, k => %(k)s, generation => %(generation)s, exact => %(exact)s,
                                     ef_search => %(ef_search)s) r
order by r.rank limit %(k)s
"""


def tune(connection: psycopg.Connection[Any], generation: int) -> dict[str, Any]:
    """What to keep in the generation's quality report as `index`: ef_search, and the recall that it reached.

    Where no width reaches the objective, the widest one stays. Empty where there are no users to ask for.
    """
    sample = connection.execute(SAMPLE, {"generation": generation, "users": USERS}).fetchall()
    if not sample:
        return {}
    truth = [_scores(connection, generation, interests, None) for (interests,) in sample]
    recall = 0.0
    for width in WIDTHS:
        found = [_scores(connection, generation, interests, width) for (interests,) in sample]
        recall = sum(map(_recall, found, truth)) / len(truth)
        if recall >= OBJECTIVE:
            break
    return {"ef_search": width, "recall": round(recall, 4), "objective": OBJECTIVE, "questions": len(sample), "k": K}


def _scores(
    connection: psycopg.Connection[Any], generation: int, interests: list[Any], width: int | None
) -> list[float]:
    """Scores of the merged answer, best first. width: None for the exact one."""
    parameters = {"interests": interests, "k": K, "generation": generation, "exact": width is None, "ef_search": width}
    return [row[0] for row in connection.execute(SEARCH, parameters).fetchall()]


def _recall(found: list[float], truth: list[float]) -> float:
    """Share of the true answer that was found. By score, so that one of two equal items is as good as the other."""
    return sum(score >= truth[-1] for score in found) / len(truth) if truth else 1.0

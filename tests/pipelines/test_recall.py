"""How the depth of the search is chosen: against a scan's truth, and not by luck."""

from typing import Any

import numpy as np
import psycopg
import pytest
from pgvector import HalfVector

from pipelines.generation import search_depth
from tests.generation_factory import Synthetic, unit, write_generation


def test_the_bar_is_the_scan_of_sql(connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last score of the exact answer, with unavailable items left out and blocks smaller than k."""
    monkeypatch.setattr(search_depth, "BLOCK", 7)
    random = np.random.default_rng(0)
    item_ids = [f"i{n:03d}" for n in range(150)]
    users = {f"u{n}": unit(random.standard_normal((1 + n, 8))) for n in range(3)}
    data = Synthetic(item_ids, unit(random.standard_normal((150, 8))), users, unavailable=frozenset(item_ids[::9]))
    generation = write_generation(connection, data, index=False)
    sample = [[HalfVector(vector) for vector in rows] for rows in users.values()]
    for k in (1, 100, 140):
        bars = search_depth.last_scores(sample, search_depth._items(connection, generation), k)
        for interests, bar in zip(sample, bars, strict=True):
            scores = connection.execute(
                "select min(score), count(*) from retrieve_vectors(%s, k => %s, exact => true)", [interests, k]
            ).fetchone()
            assert scores is not None
            assert scores[1] == min(k, 133)
            assert bar == pytest.approx(scores[0], abs=1e-6)


@pytest.mark.parametrize(
    ("recalls", "verdict"),
    [
        ([0.98] * 32, True),
        ([0.979] * 1000, False),
        # 32 questions of which one lost an interest: a mean of .98 by luck as easily as not.
        ([1.0] * 31 + [0.5], False),
        ([1.0] * 248 + [0.5] * 8, True),
        ([1.0], True),
    ],
)
def test_a_mean_of_few_is_not_enough(recalls: list[float], verdict: bool) -> None:
    assert search_depth.enough(recalls) == verdict


def test_the_sample_is_whole_users(connection: psycopg.Connection[Any]) -> None:
    """All interests of a user, in order, whoever is drawn; the same users every time."""
    random = np.random.default_rng(0)
    users = {f"u{n}": unit(random.standard_normal((1 + n % 3, 8))) for n in range(12)}
    data = Synthetic([f"i{n}" for n in range(20)], unit(random.standard_normal((20, 8))), users)
    generation = write_generation(connection, data, index=False)

    def sample(count: int) -> list[list[list[float]]]:
        rows = connection.execute(search_depth.SAMPLE, {"generation": generation, "users": count}).fetchall()
        return [[vector.to_list() for vector in interests] for (interests,) in rows]

    known = [[HalfVector(vector).to_list() for vector in rows] for rows in users.values()]
    everybody = sample(100)
    assert sorted(everybody) == sorted(known)
    assert sample(5) == everybody[:5]

"""SQL = HTTP = plain Python, rank for rank, on drawn generations."""

from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.queries import Candidate, retrieve
from tests.generation_factory import Synthetic, write_generation
from tests.serving.reference import MERGES, Found, eighths, interest_lists, matches

GENRES = ["Comedy", "Drama", "Horror", 'It\'s "odd"']
FILTERS: list[dict[str, Any]] = [
    {},
    {"genres": "Comedy"},
    {"genres": {"any": ["Comedy", "Drama"]}},
    {"genres": {"all": ["Comedy", "Drama"]}},
    {"year": {"gte": 1990, "lt": 2000}},
    {"year": 1995, "genres": 'It\'s "odd"'},
    {"rating": {"gt": -0.5, "lte": 0.25}},
    {"flag": True},
    {"flag": None},
    {"scores": {"gte": 2, "lt": 3}},
]


@st.composite
def generations(draw: st.DrawFn) -> tuple[Synthetic, int]:
    """A catalogue of up to 150 items (some identical), a user of up to 5 interests, and a k that may exceed both."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items, dim, width = draw(st.integers(1, 150)), draw(st.sampled_from([1, 3, 8])), draw(st.integers(1, 5))
    item_ids = [f"{'Éabß'[n % 4]}-{n}" for n in range(items)]
    vectors = eighths(random, items, dim)
    if draw(st.booleans()):
        vectors = vectors[random.integers(items, size=items)]
    attributes = [
        {
            "genres": [genre for genre in GENRES if random.random() < 0.4],
            "year": int(random.integers(1985, 2005)),
            "rating": float(random.integers(-4, 5) / 4),
            "flag": [True, False, None][random.integers(3)],
            "scores": [int(s) for s in random.integers(0, 5, size=2)],
        }
        for _ in range(items)
    ]
    data = Synthetic(
        item_ids,
        vectors,
        {"u": eighths(random, width, dim)},
        {"u": [float(w) for w in random.integers(1, 5, size=width)]},
        attributes=attributes,
        unavailable=frozenset(i for i in item_ids if random.random() < 0.1),
        seen={"u": [i for i in item_ids if random.random() < 0.2]},
    )
    return data, draw(st.sampled_from([1, 2, 7, 100, 1000]))


def expected(data: Synthetic, k: int, wanted: dict[str, Any], exclude_seen: bool, merge: str) -> list[Found]:
    """The reference's answer for user u."""
    assert data.attributes is not None
    qualifies = [
        item_id not in data.unavailable
        and not (exclude_seen and item_id in data.seen["u"])
        and matches(attributes, wanted)
        for item_id, attributes in zip(data.item_ids, data.attributes, strict=True)
    ]
    lists = interest_lists(data.item_ids, data.embedding, data.interests["u"], qualifies, k)
    return MERGES[merge](lists, data.weights["u"], k)


def plain(candidates: list[Candidate]) -> list[Found]:
    return [Found(c.item_id, float(np.float32(c.score)), c.rank, c.interest, c.interest_rank) for c in candidates]


@pytest.mark.parametrize("merge", MERGES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(drawn=generations(), wanted=st.sampled_from(FILTERS), exclude_seen=st.booleans())
def test_sql_agrees_with_the_reference(
    connection: psycopg.Connection[Any],
    merge: str,
    drawn: tuple[Synthetic, int],
    wanted: dict[str, Any],
    exclude_seen: bool,
) -> None:
    data, k = drawn
    with connection.transaction(force_rollback=True):
        write_generation(connection, data, index=False)
        found = retrieve(connection, "u", k=k, filter=wanted, exclude_seen=exclude_seen, merge=merge)
        assert plain(found) == expected(data, k, wanted, exclude_seen, merge)

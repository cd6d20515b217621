"""SQL = the index in memory = plain Python, rank for rank, on drawn generations. test_http.py adds HTTP."""

from typing import Any

import numpy as np
import psycopg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.memory.fill import read
from serving.memory.item_index import ItemIndex
from serving.memory.vector_index import VECTOR_INDEXES
from serving.queries import Candidate, retrieve
from serving.question import Interests, Question
from tests.generation_factory import Synthetic, write_generation
from tests.serving.reference import (
    ANY_LENGTH,
    MERGES,
    Found,
    eighths,
    interest_lists,
    matches,
    merge_diverse,
    with_provenance,
)

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


Drawn = dict[str, Any]


@st.composite
def questions(draw: st.DrawFn) -> Drawn:
    """Everything that retrieve() takes beside user and k."""
    merge = draw(st.sampled_from([*MERGES, "diverse"]))
    ids = [f"{'Éabß'[n % 4]}-{n}" for n in range(0, 200, draw(st.sampled_from([1, 2, 5])))]
    return {
        "filter": draw(st.sampled_from(FILTERS)),
        "exclude_seen": draw(st.booleans()),
        "merge": merge,
        "exclude": draw(st.sampled_from([[], ids[::3], ["nobody's", ids[0], ids[0]]])),
        "allow": draw(st.sampled_from([None, None, [], ids, [*ids[::-2], ids[0]]])),
        "diversity": {
            "attribute": draw(st.sampled_from(["genres", "year", "flag"])),
            "weight": draw(st.sampled_from([0.0, 0.125, 0.5, 100.0])),
        }
        if merge == "diverse"
        else None,
    }


def expected(data: Synthetic, k: int, question: Drawn) -> list[Found]:
    """The reference's answer for user u."""
    assert data.attributes is not None
    allow, merge = question["allow"], question["merge"]
    qualifies = [
        item_id not in data.unavailable
        and not (question["exclude_seen"] and item_id in data.seen["u"])
        and item_id not in question["exclude"]
        and (allow is None or item_id in allow)
        and matches(attributes, question["filter"])
        for item_id, attributes in zip(data.item_ids, data.attributes, strict=True)
    ]
    lists = interest_lists(data.item_ids, data.embedding, data.interests["u"], qualifies, k)
    if merge == "diverse":
        values = {
            i: row[question["diversity"]["attribute"]] for i, row in zip(data.item_ids, data.attributes, strict=True)
        }
        categories = {i: set(v if isinstance(v, list) else [v]) - {None} for i, v in values.items()}
        return with_provenance(merge_diverse(lists, k, question["diversity"]["weight"], categories), lists)
    return with_provenance(MERGES[merge](lists, data.weights["u"], k), lists)


def plain(candidates: list[Candidate]) -> list[Found]:
    return [
        Found(
            c.item_id,
            float(np.float32(c.score)),
            c.rank,
            c.interest,
            c.interest_rank,
            tuple(zip(c.found_by, c.found_ranks, c.found_scores, strict=True)),
        )
        for c in candidates
    ]


def in_memory(index: ItemIndex | None, data: Synthetic, question: Question) -> list[Candidate]:
    assert index is not None
    vectors = data.interests["u"]
    seen = data.seen["u"] if question.exclude_seen else ()
    found = index.answer(question, Interests("stored", vectors, data.weights["u"], range(len(vectors)), seen))
    assert found is not None
    return [*found]


@settings(max_examples=36, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(drawn=generations(), parts=questions())
def test_sql_and_memory_agree_with_the_reference(
    connection: psycopg.Connection[Any], drawn: tuple[Synthetic, int], parts: Drawn
) -> None:
    data, k = drawn
    with connection.transaction(force_rollback=True):
        connection.execute(ANY_LENGTH)
        write_generation(connection, data, index=False)
        question = Question(user_id="u", k=k, **parts, fields=["title"])
        found = retrieve(connection, question)
        assert plain(found) == expected(data, k, parts)
        for kind in VECTOR_INDEXES:
            assert in_memory(read(connection, 1 << 30, kind), data, question) == found, kind

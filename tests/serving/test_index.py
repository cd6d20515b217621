"""The index in memory at a size where it no longer scans, and what it leaves to Postgres."""

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.memory import interest_lists, inverted_file
from serving.memory.interest_lists import inner_products
from serving.memory.inverted_file import OBJECTIVE, InvertedFile
from serving.memory.packed_strings import Ids, Texts
from serving.memory.postings import Postings
from serving.memory.vector_index import EXACT_ITEMS, VECTOR_INDEXES, VectorIndex, make_vector_index
from tests.generation_factory import clustered

ITEMS, DIM = 6000, 16
Halves = NDArray[np.float16]
Tastes = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def data() -> tuple[Halves, Tastes]:
    """6,000 vectors in 40 clusters."""
    vectors, tastes = clustered(2, ITEMS, DIM, clusters=40)
    return vectors.astype(np.float16), tastes


@pytest.fixture(scope="module", params=VECTOR_INDEXES)
def index(request: pytest.FixtureRequest, data: tuple[Halves, Tastes]) -> VectorIndex:
    """An index of each kind over them, tuned."""
    halves, tastes = data
    made = VECTOR_INDEXES[request.param](halves)
    assert made.tune(np.concatenate([*tastes.values()])) >= OBJECTIVE
    return made


def test_an_index_holds_the_vectors(index: VectorIndex, data: tuple[Halves, Tastes]) -> None:
    halves, _ = data
    for positions in (np.array([5, 0, 5, ITEMS - 1]), slice(3, 9), np.array([], np.int64)):
        np.testing.assert_array_equal(index.vectors(positions), halves[positions].astype(np.float32))
    assert index.bytes >= halves.nbytes
    assert 0 < index.searched <= ITEMS


def test_probing_finds_what_a_scan_finds(index: VectorIndex, data: tuple[Halves, Tastes]) -> None:
    halves, tastes = data
    exact, recalls = VECTOR_INDEXES["exact"](halves), []
    for interests in tastes.values():
        found, true = (
            lists.split(len(interests))
            for lists in (index.probe(interests, 100, None, 1), exact.scan(interests, 100, None))
        )
        for (near, scores), (best, _) in zip(found, true, strict=True):
            recalls.append(len({*near.tolist()} & {*best.tolist()}) / 100)
            assert (np.diff(scores) <= 0).all()
    assert np.mean(recalls) >= 0.97


def test_a_scan_is_exact(index: VectorIndex, data: tuple[Halves, Tastes], monkeypatch: pytest.MonkeyPatch) -> None:
    halves, tastes = data
    monkeypatch.setattr(interest_lists, "BLOCK", 1700)  # three rounds and a remainder
    allowed = np.arange(ITEMS) % 50 == 0
    for mask in (None, allowed):
        (near, scores), *_ = index.scan(tastes["u1"], 60, mask).split(4)
        every = inner_products(halves.astype(np.float32), tastes["u1"][0])
        order = np.lexsort((np.arange(ITEMS), -np.where(True if mask is None else mask, every, -np.inf)))
        np.testing.assert_array_equal(near, order[:60])
        np.testing.assert_array_equal(scores, every[order[:60]])


@pytest.mark.parametrize("share", [2, 40, 5990])
def test_k_come_whenever_k_qualify(index: VectorIndex, data: tuple[Halves, Tastes], share: int) -> None:
    allowed = np.arange(ITEMS) % share == 0
    many = min(100, int(allowed.sum()))
    for near, _ in index.probe(data[1]["u2"], 100, allowed, 1).split(4):
        assert len(near) == many
        assert allowed[near].all()


def test_pieces_make_the_same_cells(data: tuple[Halves, Tastes], monkeypatch: pytest.MonkeyPatch) -> None:
    halves, tastes = data
    whole = InvertedFile(halves, 24)
    monkeypatch.setattr(inverted_file, "BLOCK", 1700)
    pieces, everything = InvertedFile(halves, 24), np.arange(ITEMS)
    np.testing.assert_array_equal(pieces.vectors(everything), whole.vectors(everything))
    for interests in tastes.values():
        for one, other in zip(
            pieces.probe(interests, 50, None, 1).split(len(interests)),
            whole.probe(interests, 50, None, 1).split(len(interests)),
            strict=True,
        ):
            np.testing.assert_array_equal(one[0], other[0])


def test_size_chooses_unless_a_setting_does() -> None:
    few, many = np.ones((3, 1), np.float16), np.ones((EXACT_ITEMS + 1, 1), np.float16)
    chosen = {
        (len(rows), kind): type(make_vector_index(rows, kind)) for rows in (few, many) for kind in (None, "exact")
    }
    assert chosen[3, None] is chosen[3, "exact"] is chosen[EXACT_ITEMS + 1, "exact"] is VECTOR_INDEXES["exact"]
    assert chosen[EXACT_ITEMS + 1, None] is VECTOR_INDEXES["inverted_file"]
    assert type(make_vector_index(few[:0], "inverted_file")) is VECTOR_INDEXES["exact"]


def test_unknown_ids_have_no_position() -> None:
    words = ["", "a", "é", "日本"]
    ids = Ids(Texts("".join(words).encode(), np.array([len(w.encode()) for w in words], np.int32)))
    assert ids.positions(["日本", "nobody", "a", "", "a"]).tolist() == [3, -1, 1, 0, 1]
    assert ids.positions([]).tolist() == []
    assert ids.at(np.array([2, 0])) == ["é", ""]
    assert Texts(b"x", np.array([-1, 1], np.int32)).at([0, 1]) == [None, "x"]


@pytest.fixture
def postings() -> Postings:
    made = Postings(5)
    made.add("price", "1.0", np.array([0], np.int32))
    made.add("price", "1", np.array([1], np.int32))
    made.add("price", "2.5", np.array([2, 3], np.int32))
    made.add("price", '"cheap"', np.array([4], np.int32))
    made.add("nested", "[1]", np.array([0], np.int32))
    made.add_attribute("empty")
    made.leave_out("unique")
    return made


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"price": 1}, [0, 1]),
        ({"price": 1.0}, [0, 1]),
        ({"price": Decimal("2.50")}, [2, 3]),
        ({"price": "1"}, []),
        ({"price": {"gt": 1}}, [2, 3]),
        ({"price": {"gte": 1, "lt": 2.5}}, [0, 1]),
        ({"price": {"gte": 3, "lt": 1}}, []),
        ({"price": {"gte": "a"}}, [4]),
        ({"price": {"gte": 1, "lt": "z"}}, []),
        ({"price": {"any": [2.5, "cheap"], "gt": 0}}, [2, 3]),
        ({"price": {"all": [1, 2.5]}}, []),
        ({"empty": 1}, []),
        ({}, [0, 1, 2, 3, 4]),
        # Postgres' business: unknown or unsure attributes, and faults to be named.
        ({"cost": 1}, None),
        ({"nested": 1}, None),
        ({"unique": 1}, None),
        ({"price": [1]}, None),
        ({"price": True}, None),
        ({"price": {}}, None),
        ({"price": {"any": []}}, None),
        ({"price": {"any": [[1]]}}, None),
        ({"price": {"near": 1}}, None),
        ({"price": {"gt": None}}, None),
        ({"price": {"gt": True}}, None),
        ({"price": float("nan")}, None),
        ({"price": "\x00"}, None),
    ],
    ids=str,
)
def test_filters(postings: Postings, wanted: dict[str, Any], found: list[int] | None) -> None:
    mask = postings.mask(wanted)
    assert (None if mask is None else np.flatnonzero(mask).tolist()) == found

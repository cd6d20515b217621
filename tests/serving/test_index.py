"""The index in memory at a size where it no longer scans, and what it leaves to Postgres."""

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.memory import inverted_file
from serving.memory.inverted_file import Cells, inner_products
from serving.memory.packed_strings import Ids, Texts
from serving.memory.postings import Postings
from tests.generation_factory import clustered

ITEMS, DIM = 6000, 16


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> tuple[Cells, NDArray[np.float16], dict[str, NDArray[np.float32]]]:
    """6,000 vectors in cells, as if they were too many to scan; all cells hold about 40."""
    monkeypatch.setattr(inverted_file, "EXACT_ITEMS", 1000)
    vectors, tastes = clustered(2, ITEMS, DIM, clusters=40)
    halves = vectors.astype(np.float16)
    return Cells(halves, 24), halves, tastes


def test_pieces_make_the_same_cells(probed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, halves, tastes = probed
    monkeypatch.setattr(inverted_file, "BLOCK", 1700)  # three rounds and a remainder
    pieces, everything = Cells(halves, 24), np.arange(ITEMS)
    np.testing.assert_array_equal(pieces.vectors(everything), found.vectors(everything))
    for interests in tastes.values():
        for one, other in zip(
            pieces.probe(interests, 50, None, 1).split(len(interests)),
            found.probe(interests, 50, None, 1).split(len(interests)),
            strict=True,
        ):
            np.testing.assert_array_equal(one[0], other[0])


def test_probing_finds_what_a_scan_finds(probed: Any) -> None:
    found, halves, tastes = probed
    exact = Cells(halves, None)
    recalls = []
    for interests in tastes.values():
        probed_lists, exact_lists = (
            lists.split(len(interests))
            for lists in (found.probe(interests, 100, None, 1), exact.scan(interests, 100, None))
        )
        for (near, scores), (true, _) in zip(probed_lists, exact_lists, strict=True):
            recalls.append(len({*near.tolist()} & {*true.tolist()}) / 100)
            assert (np.diff(scores) <= 0).all()
    assert np.mean(recalls) >= 0.97


def test_a_scan_is_exact_with_and_without_cells(probed: Any) -> None:
    found, halves, tastes = probed
    allowed = np.arange(ITEMS) % 50 == 0
    for mask in (None, allowed):
        (near, scores), *_ = found.scan(tastes["u1"], 60, mask).split(4)
        every = inner_products(halves.astype(np.float32), tastes["u1"][0])
        order = np.lexsort((np.arange(ITEMS), -np.where(True if mask is None else mask, every, -np.inf)))
        np.testing.assert_array_equal(near, order[:60])
        np.testing.assert_array_equal(scores, every[order[:60]])


@pytest.mark.parametrize("share", [2, 40, 5990])
def test_k_come_whenever_k_qualify(probed: Any, share: int) -> None:
    found, _, tastes = probed
    allowed = np.arange(ITEMS) % share == 0
    many = min(100, int(allowed.sum()))
    for near, _ in found.probe(tastes["u2"], 100, allowed, 1).split(4):
        assert len(near) == many
        assert allowed[near].all()


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

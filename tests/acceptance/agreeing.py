"""Answers of two ways to one question, held against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.acceptance.world import check

# Two ways may add up a score's products in another order.
TOLERANCE = 2e-4
# Scores nearer than this are as good as each other.
NEAR = 5e-3


@dataclass(frozen=True)
class Row:
    """A candidate or neighbour of any way to ask."""

    item_id: str
    score: float
    rank: int


def rows(candidates: Sequence[Any]) -> list[Row]:
    """From objects, mappings, or tuples (item_id, score, rank, …)."""
    return [_row(candidate) for candidate in candidates]


def same(what: str, one: Sequence[Any], other: Sequence[Any], tolerance: float = TOLERANCE) -> None:
    """Raises StepError unless both list the same items with the same scores; those of equal score may change places."""
    left, right = rows(one), rows(other)
    check(len(left) == len(right), f"{what}: {len(left)} candidates and {len(right)}")
    for a, b in zip(left, right, strict=True):
        check(a.rank == b.rank and abs(a.score - b.score) <= tolerance, f"{what}, at rank {a.rank}: {a} and {b}")
    scores = {row.item_id: row.score for row in right}
    last = right[-1].score if right else 0.0
    for row in left:
        expected = scores.get(row.item_id, last)  # the last place goes to either of two that are equally good
        check(abs(row.score - expected) <= tolerance, f"{what}: {row} scores {expected} in the other answer")


def overlap(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Share of the second's items that the first has, or has as good ones for: of near ties an index finds any."""
    found, wanted = rows(one), rows(other)
    ids, last = {row.item_id for row in wanted}, min((row.score for row in wanted), default=0.0)
    agreed = sum(row.item_id in ids or row.score >= last - NEAR for row in found)
    return min(1.0, agreed / max(1, len(wanted)))


def sound(what: str, candidates: Sequence[Any], k: int, *, without: Sequence[str] = ()) -> None:
    """Raises StepError unless these are k different items, ranked from 1 by falling score, none of them left out."""
    listed = rows(candidates)
    ids = [row.item_id for row in listed]
    check(len(ids) == k, f"{what}: {len(ids)} candidates instead of {k}")
    check(len(set(ids)) == k, f"{what}: an item came twice")
    check([row.rank for row in listed] == list(range(1, k + 1)), f"{what}: ranks {[row.rank for row in listed]}")
    check(not set(without) & set(ids), f"{what}: {sorted(set(without) & set(ids))} were to be left out")


def _row(candidate: Any) -> Row:
    if isinstance(candidate, tuple):
        return Row(str(candidate[0]), float(candidate[1]), int(candidate[2]))
    if isinstance(candidate, Mapping):
        return Row(candidate["item_id"], float(candidate["score"]), int(candidate["rank"]))
    return Row(candidate.item_id, float(candidate.score), int(candidate.rank))

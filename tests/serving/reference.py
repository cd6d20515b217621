"""Retrieval in plain numpy and Python: what SQL and HTTP must agree with, rank for rank.

Exact where vectors are: drawn from multiples of 1/8, an inner product has no rounding at all (see eighths()).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Found:
    """One candidate, as every interface answers it. interest counts from 0, ranks from 1.

    found_by: (interest, rank, score) of all interests that found it.
    """

    item_id: str
    score: float
    rank: int
    interest: int
    interest_rank: int
    found_by: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True)
class Listed:
    """One row of one interest's list."""

    item_id: str
    score: float
    interest: int
    rank: int


def interest_lists(
    item_ids: Sequence[str], vectors: NDArray[Any], interests: NDArray[Any], qualifies: Sequence[bool], depth: int
) -> list[list[Listed]]:
    """The `depth` best qualifying items of each interest; ties by item id. vectors [V, D], interests [K, D]."""
    lists = []
    for number, interest in enumerate(interests):
        scores = (vectors.astype(np.float32) * interest.astype(np.float32)).sum(axis=1, dtype=np.float32)
        rows = [(-float(s), item_id) for s, item_id, q in zip(scores, item_ids, qualifies, strict=True) if q]
        best = sorted(rows, key=lambda row: (row[0], row[1].encode()))[:depth]
        lists.append([Listed(item_id, -score, number, rank) for rank, (score, item_id) in enumerate(best, 1)])
    return lists


def _best(lists: list[list[Listed]]) -> list[Listed]:
    """One row per item, the best-scored, of the lowest interest among equals; by score, then item id."""
    best: dict[str, Listed] = {}
    for row in (row for rows in lists for row in rows):
        kept = best.get(row.item_id)
        if kept is None or row.score > kept.score:
            best[row.item_id] = row
    return sorted(best.values(), key=_by_score)


def _by_score(row: Listed) -> tuple[float, bytes]:
    return -row.score, row.item_id.encode()


def _numbered(rows: Sequence[Listed]) -> list[Found]:
    return [Found(row.item_id, row.score, n, row.interest, row.rank) for n, row in enumerate(rows, 1)]


def merge_max(lists: list[list[Listed]], weights: Sequence[float], k: int) -> list[Found]:
    """By best score."""
    return _numbered(_best(lists)[:k])


def merge_quota(lists: list[list[Listed]], weights: Sequence[float], k: int) -> list[Found]:
    """Each interest places its share of k, by largest remainder; what is left goes by score."""
    shares = [k * float(np.float32(w)) / sum(float(np.float32(x)) for x in weights) for w in weights]
    quotas = [int(share) for share in shares]
    for number in sorted(range(len(shares)), key=lambda n: (-(shares[n] - quotas[n]), n))[: k - sum(quotas)]:
        quotas[number] += 1
    within, over = [], []
    for row in _best(lists):
        quotas[row.interest] -= 1
        (within if quotas[row.interest] >= 0 else over).append(row)
    return _numbered(sorted((within + over)[:k], key=_by_score))


def merge_rrf(lists: list[list[Listed]], weights: Sequence[float], k: int) -> list[Found]:
    """Reciprocal rank fusion with the constant 60."""
    ranks: dict[str, list[int]] = {}
    for row in (row for rows in lists for row in rows):
        ranks.setdefault(row.item_id, []).append(row.rank)
    scores = {
        item_id: float(np.float32(sum(1 / (60 + rank) for rank in sorted(found)))) for item_id, found in ranks.items()
    }
    fused = [replace(row, score=scores[row.item_id]) for row in _best(lists)]
    return _numbered(sorted(fused, key=_by_score)[:k])


def merge_soft(lists: list[list[Listed]], weights: Sequence[float], k: int) -> list[Found]:
    """The soft maximum of the scores, at temperature .07."""
    scores: dict[str, list[float]] = {}
    for row in (row for rows in lists for row in rows):
        scores.setdefault(row.item_id, []).append(row.score)
    soft = {
        item_id: float(np.float32(max(found) + 0.07 * math.log(sum(math.exp((x - max(found)) / 0.07) for x in found))))
        for item_id, found in scores.items()
    }
    return _numbered(sorted((replace(row, score=soft[row.item_id]) for row in _best(lists)), key=_by_score)[:k])


def merge_diverse(lists: list[list[Listed]], k: int, weight: float, categories: Mapping[str, set[Any]]) -> list[Found]:
    """One by one the item of largest score + weight × (picked ones that share no category with it)."""
    pool, picked = _best(lists), list[Listed]()
    while pool and len(picked) < k:
        worth = [
            row.score - weight * sum(bool(categories[row.item_id] & categories[p.item_id]) for p in picked)
            for row in pool
        ]
        picked.append(pool.pop(worth.index(max(worth))))
    return _numbered(picked)


def with_provenance(found: Sequence[Found], lists: list[list[Listed]]) -> list[Found]:
    """The same, with all interests that found each item."""
    by: dict[str, list[tuple[int, int, float]]] = {}
    for row in (row for rows in lists for row in rows):
        by.setdefault(row.item_id, []).append((row.interest, row.rank, row.score))
    return [replace(row, found_by=tuple(by[row.item_id])) for row in found]


MERGES: Mapping[str, Callable[[list[list[Listed]], Sequence[float], int], list[Found]]] = {
    "max": merge_max,
    "quota": merge_quota,
    "rrf": merge_rrf,
    "soft": merge_soft,
}


def matches(attributes: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether an item's attributes satisfy a filter: every key must."""
    return all(_matches(attributes[key], rule) if key in attributes else False for key, rule in wanted.items())


def _matches(value: Any, rule: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    if not isinstance(rule, dict):
        return any(_equal(v, rule) for v in values)
    ranges = {name: bound for name, bound in rule.items() if name not in ("any", "all")}
    return (
        ("any" not in rule or any(_equal(v, w) for w in rule["any"] for v in values))
        and ("all" not in rule or all(any(_equal(v, w) for v in values) for w in rule["all"]))
        and (not ranges or any(all(_compare(v, name, bound) for name, bound in ranges.items()) for v in values))
    )


def _equal(a: Any, b: Any) -> bool:
    return _kind(a) == _kind(b) and bool(a == b)


def _compare(value: Any, name: str, bound: Any) -> bool:
    if _kind(value) != _kind(bound):
        return False
    return {"gt": value > bound, "gte": value >= bound, "lt": value < bound, "lte": value <= bound}[name]


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else type(value).__name__


def eighths(random: np.random.Generator, rows: int, dim: int) -> NDArray[np.float32]:
    """Vectors [rows, dim] of multiples of 1/8 in [-1, 1]: their inner products are exact, and ties are many."""
    return (random.integers(-8, 9, size=(rows, dim)) / 8).astype(np.float32)


# Eighths are summed exactly in any order, and are no unit vectors.
ANY_LENGTH = """
alter table item_embeddings drop constraint item_embeddings_unit_check;
alter table user_interests drop constraint user_interests_unit_check, drop constraint user_interests_weight_check;
"""

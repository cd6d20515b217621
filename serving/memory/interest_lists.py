"""Scores of items, the best of them for each interest, and exact scans: what every vector index is made of.

Shapes: V items, D dimensions, K interests. Vectors are kept in 16 bits, as Postgres keeps them; sums are 32-bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Rows scored at once in a scan: what fits a core's cache.
BLOCK = 8192


@dataclass(frozen=True)
class Lists:
    """Rows of all per-interest lists, R of them, interest after interest, each by score, then position.

    interest, position of the item, score, rank in the interest (from 1). A pair of interest and position comes once.
    """

    interest: Ints
    position: Ints
    score: Floats
    rank: Ints

    @staticmethod
    def best(interest: Ints, position: Ints, score: Floats, k: int) -> "Lists":
        """The k best of each interest, from rows whose interests ascend."""
        order = np.lexsort((by_score(score, position), interest.astype(np.int16)))  # small numbers are sorted by radix
        rank = np.arange(1, len(order) + 1) - np.searchsorted(interest, interest)
        first = rank <= k
        order = order[first]
        return Lists(interest[order], position[order], score[order], rank[first])

    def split(self, interests: int) -> list[tuple[Ints, Floats]]:
        """(positions, scores) of each interest."""
        ends = np.searchsorted(self.interest, np.arange(1, interests))
        return list(zip(np.split(self.position, ends), np.split(self.score, ends), strict=True))


def scan(
    vectors: Callable[[Ints | slice], Floats], items: int, interests: Floats, k: int, allowed: Mask | None
) -> Lists:
    """The k best allowed items of each interest, exactly. vectors: rows [P, D] of these positions."""
    positions = None if allowed is None else np.flatnonzero(allowed)
    scores = np.empty((len(interests), items if positions is None else len(positions)), np.float32)
    for start in range(0, scores.shape[1], BLOCK):
        piece = slice(start, start + BLOCK)
        rows = vectors(piece if positions is None else positions[piece])
        np.matmul(interests, rows.T, out=scores[:, piece])
    interest, near = _nearly_best(scores, k)
    near = near if positions is None else positions[near]
    return ranked(interests, interest, near, vectors(near), k)


def scan_members(interests: Floats, k: int, members: Ints, rows: Floats, allowed: Mask) -> Lists:
    """As scan(), over members whose rows [M, D] are at hand; of them those that are allowed."""
    scores = interests @ rows.T
    scores[:, ~allowed[members]] = -np.inf
    interest, near = _nearly_best(scores, k)
    return ranked(interests, interest, members[near], rows[near], k)


def ranked(interests: Floats, interest: Ints, positions: Ints, rows: Floats, k: int) -> Lists:
    """The k best of the rows [R, D] found for each interest, by scores that are the same whoever computes them."""
    return Lists.best(interest, positions, inner_products(rows, interests[interest]), k)


def by_score(score: Floats, position: Ints) -> Ints:
    """Numbers that ascend as rows do: by falling score, then by position; one sort instead of two."""
    bits = (np.float32(0) - score).view(np.int32)  # 0 - 0 is 0 whatever its sign
    falling: Ints = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    return (falling << 32) | position


def inner_products(rows: Floats, vectors: Floats) -> Floats:
    """Scores [P] of rows [P, D] with vectors [P, D] or [D], to the last bit as pgvector computes them on x86.

    That is, for halfvec: eight sums side by side.

    Matrix products add in another order, and a score should not depend on who computed it. Products of 16-bit floats
    are exact in 32 bits, so that fused and separate additions are the same. (Elsewhere the last bit may differ.)
    """
    products_DP = (rows * vectors).T.copy()  # whole rows of numbers to add, not eight at a time
    whole = len(products_DP) // 8 * 8
    lanes = np.add.reduce(products_DP[:whole].reshape(whole // 8, 8, len(rows)), axis=0, initial=0)
    quads = lanes[:4] + lanes[4:]
    pairs = quads[:2] + quads[2:]
    sums: Floats = pairs[0] + pairs[1]
    for row in products_DP[whole:]:
        sums += row
    return sums


def _nearly_best(scores: Floats, k: int) -> tuple[Ints, Ints]:
    """(interest, number) of each interest's k largest finite scores, of scores [K, P], and of all within a rounding."""
    near = [_nearly_first(row, k) for row in scores]
    return np.repeat(np.arange(len(scores)), list(map(len, near))), np.concatenate(near)


def _nearly_first(scores: Floats, k: int) -> Ints:
    """Numbers of the k largest scores, of all that equal the last of them, and of those within a rounding of it."""
    bar = np.partition(scores, len(scores) - k)[len(scores) - k] if len(scores) > k else -np.inf
    if bar == -np.inf:
        return np.flatnonzero(scores > bar)
    return np.flatnonzero(scores >= bar - np.float32(1e-5) * max(np.float32(1), abs(bar)))

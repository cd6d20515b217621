"""Merges of per-interest lists in numpy: the same rules, ties included, as migrations/sql/merge_lists_v1.sql.

Items are positions in ascending order of their id's bytes, so a tie on the score goes to the lower position.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.memory.interest_lists import Floats, Ints, Lists

# Reciprocal rank fusion's constant (Cormack et al., SIGIR 2009).
FUSION = 60
# The temperature that all presets train with: the maximum over interests is as soft as it was to the loss.
SOFTNESS = 0.07


@dataclass(frozen=True)
class Merged:
    """The answer, best first: rows of Lists, each item's best one, and the score that the merge gave it."""

    row: Ints
    score: Floats


@dataclass(frozen=True)
class MergeContext:
    """What a merge may look at beside the lists. k: candidates wanted; weights: one per interest; diversity: the weight
    of differing; categories: those of rows given by number. The last two are for `diverse` only.
    """

    k: int
    weights: Sequence[float]
    diversity: float = 0.0
    categories: Callable[[Ints], NDArray[np.bool_]] | None = None


def best_rows(lists: Lists) -> Ints:
    """One row per item, its best-scored (of equals the lowest interest's), by score, then position."""
    order = np.lexsort((-lists.score, lists.position))  # stable: of equals the first interest's comes first
    positions = lists.position[order]
    first = np.ones(len(order), bool)
    first[1:] = positions[1:] != positions[:-1]
    rows: Ints = order[first]
    return rows[np.argsort(-lists.score[rows], kind="stable")]


def merge_max(lists: Lists, context: MergeContext) -> Merged:
    """By the best score of any interest."""
    rows = best_rows(lists)[: context.k]
    return Merged(rows, lists.score[rows])


def merge_quota(lists: Lists, context: MergeContext) -> Merged:
    """Each interest places its share of k by weight (largest remainder), what is left goes by score."""
    rows = best_rows(lists)
    quotas = shares(context.weights, context.k)
    interests = lists.interest[rows]
    over = np.zeros(len(rows), bool)
    for interest, quota in enumerate(quotas):
        over[np.flatnonzero(interests == interest)[quota:]] = True
    rows = rows[np.sort(np.argsort(over, kind="stable")[: context.k])]
    return Merged(rows, lists.score[rows])


def shares(weights: Sequence[float], k: int) -> list[int]:
    """k places by weight, by largest remainder; of equal remainders the first interest's is rounded up."""
    exact = [float(np.float32(weight)) for weight in weights]
    parts = [k * weight / sum(exact) for weight in exact]
    places = [int(part) for part in parts]
    for number in sorted(range(len(parts)), key=lambda n: (places[n] - parts[n], n))[: k - sum(places)]:
        places[number] += 1
    return places


def merge_rrf(lists: Lists, context: MergeContext) -> Merged:
    """Reciprocal rank fusion: the sum of 1 / (60 + rank) over the interests that found the item."""
    order = np.lexsort((lists.rank, lists.position))  # summed from the best rank on, as SQL does
    positions, starts = np.unique(lists.position[order], return_index=True)
    return _fused(lists, context.k, positions, _sums(1.0 / (FUSION + lists.rank[order]), starts))


def merge_soft(lists: Lists, context: MergeContext) -> Merged:
    """τ · log Σ exp(score / τ) over the interests that found the item: the soft maximum of `soft_consistent`.

    An interest that did not list it would add less than its last one does: recall moves by .001 (docs/LOG.md).
    """
    order = np.argsort(lists.position, kind="stable")
    positions, starts = np.unique(lists.position[order], return_index=True)
    scores = lists.score[order].astype(np.float64)
    best = np.maximum.reduceat(scores, starts) if len(scores) else scores
    ratios = np.exp((scores - np.repeat(best, np.diff(starts, append=len(scores)))) / SOFTNESS)
    return _fused(lists, context.k, positions, best + SOFTNESS * np.log(_sums(ratios, starts)))


def _fused(lists: Lists, k: int, positions: Ints, scores: NDArray[np.float64]) -> Merged:
    """The answer by these scores, one per item; positions are ascending."""
    rows = best_rows(lists)
    fused = scores.astype(np.float32)[np.searchsorted(positions, lists.position[rows])]
    best = np.lexsort((lists.position[rows], -fused))[:k]
    return Merged(rows[best], fused[best])


def _sums(values: NDArray[np.float64], starts: Ints) -> NDArray[np.float64]:
    """Sums of the runs of `values` that begin at `starts`, each added from left to right (reduceat adds in pairs)."""
    lengths = np.diff(starts, append=len(values))
    sums = np.zeros(len(starts))
    for step in range(int(lengths.max(initial=0))):
        longer = lengths > step
        sums[longer] += values[starts[longer] + step]
    return sums


def merge_diverse(lists: Lists, context: MergeContext) -> Merged:
    """One by one the item of largest score + weight × (number of picked ones that share no category with it).

    ComiRec's greedy inference (KDD 2020, section 3.4), for items of any number of categories.
    """
    assert context.categories is not None
    rows = best_rows(lists)
    scores = lists.score[rows].astype(np.float64)
    categories = context.categories(lists.position[rows])
    shared = np.zeros(len(rows))
    free = np.ones(len(rows), bool)
    picks = []
    for _ in range(min(context.k, len(rows))):
        pick = int(np.argmax(np.where(free, scores - context.diversity * shared, -np.inf)))
        free[pick] = False
        shared += categories[:, categories[pick]].any(axis=1)
        picks.append(pick)
    rows = rows[np.array(picks, dtype=np.int64)]
    return Merged(rows, lists.score[rows])


MERGES: Mapping[str, Callable[[Lists, MergeContext], Merged]] = {
    "max": merge_max,
    "quota": merge_quota,
    "rrf": merge_rrf,
    "soft": merge_soft,
    "diverse": merge_diverse,
}


def provenance(lists: Lists, rows: Ints) -> tuple[Ints, Ints]:
    """Who found the items of these rows: all their rows of the lists, item after item, and where each item's end."""
    order = np.argsort(lists.position, kind="stable")
    positions, wanted = lists.position[order], lists.position[rows]
    starts = np.searchsorted(positions, wanted)
    counts = np.searchsorted(positions, wanted, "right") - starts
    ends = np.cumsum(counts)
    offsets = np.repeat(starts - ends + counts, counts)
    return order[offsets + np.arange(len(offsets))], ends

"""Shared rows of the ID table for the tail of a catalogue: two hashed rows an item, so that few items agree in both.

Double hashing as in Zhang et al., RecSys 2020 (arXiv 2007.14523), by sum. Legend: V items, R rows, D width.
"""

import numpy as np
from numpy.typing import NDArray

from encoders.catalogue import FloatArray, IntArray

Places = NDArray[np.int32]


def places(counts: IntArray, buckets: int, below: int) -> Places:
    """Which two rows of the table make an item, int32 [V, 2].

    Items with at least `below` events have the rows 0, 1, 2 … for themselves, named twice; the others two different
    ones of the `buckets` rows behind those, drawn by their index.
    """
    own = counts >= below
    index = np.arange(len(counts), dtype=np.uint64)
    first = _mixed(index) % np.uint64(buckets)
    # never the same one: a step of 1 to buckets - 1 further
    second = (first + np.uint64(1) + _mixed(~index) % np.uint64(buckets - 1)) % np.uint64(buckets)
    shared = own.sum() + np.stack([first, second], axis=1).astype(np.int64)
    alone = np.repeat((np.cumsum(own) - 1)[:, None], 2, axis=1)
    return np.where(own[:, None], alone, shared).astype(np.int32)


def gathered(vectors: FloatArray, taken: Places, rows: int) -> FloatArray:
    """A table [R, D] whose sums come near the vectors [V, D]: a row is half the mean of the tail items that share it.

    An item with a row of its own has its vector there.
    """
    table = np.zeros((rows, vectors.shape[1]), dtype=np.float32)
    alone = taken[:, 0] == taken[:, 1]
    table[taken[alone, 0]] = vectors[alone]
    weights = np.bincount(taken[~alone].ravel(), minlength=rows)
    for column in range(2):
        np.add.at(table, taken[~alone, column], vectors[~alone] / 2)
    shared = weights > 0
    table[shared] /= weights[shared, None]
    return table


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

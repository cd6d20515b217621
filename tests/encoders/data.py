"""Small catalogues and histories for the towers' tests, in memory."""

from collections.abc import Mapping, Sequence

import numpy as np

from encoders.catalogue import Catalogue, Histories

ITEMS = 30


def tiny_catalogue(items: int = ITEMS, seed: int = 0, *, content: bool = True) -> Catalogue:
    """Items of three tastes whose content shows the taste; each modality misses some items, the last one lacks all."""
    ids = [f"i{item}" for item in range(items)]
    if not content:
        return Catalogue(ids)
    rng = np.random.default_rng(seed)
    tastes = np.arange(items) % 3
    rows, present = {}, {}
    for name, width in (("text", 12), ("attributes", 8)):
        vectors = rng.normal(size=(3, width))[tastes] + 0.1 * rng.normal(size=(items, width))
        there = rng.random(items) < 0.8
        there[:3], there[-1] = True, False
        present[name] = there
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        rows[name] = (unit * there[:, None]).astype(np.float32)
    return Catalogue(ids, rows, present)


def histories_of(sequences: Mapping[str, Sequence[int]], times: Mapping[str, Sequence[int]] | None = None) -> Histories:
    """Histories from {user id: item indices, oldest first}; times default to the position within the history."""
    lengths = np.array([len(items) for items in sequences.values()], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    clock = [list(times[user]) if times else list(range(len(items))) for user, items in sequences.items()]
    return Histories(
        list(sequences),
        offsets,
        np.array([item for items in sequences.values() for item in items], dtype=np.int64),
        np.array([moment for moments in clock for moment in moments], dtype=np.int64),
    )


def tiny_histories(users: int = 40, items: int = ITEMS, seed: int = 0, longest: int = 12) -> Histories:
    """Users who walk through the items of one taste in order, from a place of their own; 1 to `longest` events."""
    rng = np.random.default_rng(seed)
    sequences = {}
    for user in range(users):
        start, length = int(rng.integers(items)), int(rng.integers(1, longest + 1))
        walk = (start + 3 * np.arange(length)) % (items - items % 3)
        sequences[f"u{user}"] = [int(item) for item in walk]
    return histories_of(sequences)

"""Vectors as codes: product quantisation for search, residual quantisation for names.

Product (Jégou et al. 2011): the vector is cut into sub-spaces, and each part becomes the number of its nearest
centroid. Residual (semantic IDs: TIGER, arXiv 2305.05065, §3.1): each level codes what the levels before it left over.
Deviation: k-means instead of a trained RQ-VAE, and no number that tells apart items with equal codes. Both are trained
by faiss, from a seed; reading codes needs numpy alone.

Legend: N vectors, D their width, C sub-spaces or levels, S centroids (at most 256: a code is one byte).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from encoders.catalogue import FloatArray

CENTROIDS = 256
# Of a small catalogue's semantic IDs: so many items share a number at least, or it says no more than an item's id.
SHARED = 16
SUBSPACES = 16
LEVELS = 4
ROUNDS = 20
# Vectors encoded at once.
CHUNK = 16_384

Codes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Product:
    """A product quantiser. centroids: float32 [C, S, D / C]."""

    centroids: FloatArray

    def encode(self, vectors_ND: FloatArray) -> Codes:
        """Codes [N, C] of the nearest centroids."""
        parts = np.split(vectors_ND, len(self.centroids), axis=1)
        return _stacked([_nearest(part, own) for part, own in zip(parts, self.centroids, strict=True)])

    def decode(self, codes_NC: Codes) -> FloatArray:
        """The centroids that the codes stand for, [N, D]."""
        found: FloatArray = self.centroids[np.arange(len(self.centroids)), codes_NC]
        return found.reshape(len(codes_NC), found.shape[1] * found.shape[2])


@dataclass(frozen=True, eq=False)
class Residual:
    """A residual quantiser. centroids: float32 [C, S, D], the coarsest level first."""

    centroids: FloatArray

    def encode(self, vectors_ND: FloatArray) -> Codes:
        """Codes [N, C], level by level: equal beginnings mean similar items."""
        rest, codes = vectors_ND, []
        for own in self.centroids:
            codes.append(_nearest(rest, own))
            rest = rest - own[codes[-1]]
        return _stacked(codes)

    def decode(self, codes_NC: Codes) -> FloatArray:
        """The sum of the centroids that the codes stand for, [N, D]."""
        found: FloatArray = self.centroids[np.arange(len(self.centroids)), codes_NC].sum(axis=1)
        return found


def train_product(vectors_ND: FloatArray, subspaces: int = SUBSPACES, seed: int = 0) -> Product:
    """A product quantiser of these vectors; of fewer than 256 it has as many centroids as vectors, and loses nothing.

    Raises ValueError without vectors, or where D is no multiple of the sub-spaces.
    """
    _, width = vectors_ND.shape
    if width % subspaces:
        raise ValueError(f"vectors of {width} numbers cannot be cut into {subspaces} equal parts")
    parts = np.split(vectors_ND, subspaces, axis=1)
    return Product(np.stack([_centroids(part, seed + place) for place, part in enumerate(parts)]))


def train_residual(vectors_ND: FloatArray, levels: int = LEVELS, seed: int = 0) -> Residual:
    """A residual quantiser of these vectors, of N / 16 centroids (16 to 256). Raises ValueError without vectors."""
    rest, found = vectors_ND, []
    count = min(CENTROIDS, max(SHARED, len(vectors_ND) // SHARED))
    for level in range(levels):
        own = _centroids(rest, seed + level, count)
        found.append(own)
        rest = rest - own[_nearest(rest, own)]
    return Residual(np.stack(found))


def _centroids(vectors: FloatArray, seed: int, most: int = CENTROIDS) -> FloatArray:
    """At most so many centroids [S, d] by k-means."""
    import faiss

    if not len(vectors):
        raise ValueError("a quantiser needs vectors to be trained on")
    count = min(most, len(vectors))
    if count == len(vectors):
        return np.array(vectors, np.float32)
    means = faiss.Kmeans(
        vectors.shape[1], count, niter=ROUNDS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=256
    )
    means.train(np.ascontiguousarray(vectors, np.float32))
    return np.array(means.centroids, np.float32)


def _nearest(vectors: FloatArray, centroids: FloatArray) -> NDArray[np.int64]:
    """Number of the nearest centroid of each vector; of equally near ones the first."""
    half = (centroids.astype(np.float64) ** 2).sum(axis=1) / 2
    pieces = [vectors[start : start + CHUNK] for start in range(0, len(vectors), CHUNK)]
    found = [(piece.astype(np.float64) @ centroids.T.astype(np.float64) - half).argmax(axis=1) for piece in pieces]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _stacked(codes: list[NDArray[np.int64]]) -> Codes:
    return np.stack(codes, axis=1).astype(np.uint8)

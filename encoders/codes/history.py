"""Which events of a long history are most like a candidate, by codes alone: SEMINAR's multimodal PQ (2407.10714, §3.4).

ã_t = Σ_mn w_m w_n Σ_c ⟨C_m[c, code(q)], C_n[c, code(k_t)]⟩. The sum over m is folded first: it is a product with one
vector, q = Σ_m w_m C_m[code(q)]. For one candidate a table of such products is looked up M·C times an event; for many
candidates of one user, the history is folded as well, once, and the rest is one matrix product. Deviation: weights are
shared out among the modalities that an item has, so that a missing modality and a masked one give the same score.

Legend: N candidates, T events, M modalities, C sub-spaces, S centroids, D width.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from encoders.catalogue import BoolArray, FloatArray
from encoders.codes.quantise import Codes

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Coded:
    """N items. codes: uint8 [N, M, C]; present: bool [N, M]; codes of modalities that are absent say nothing."""

    codes: Codes
    present: BoolArray

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: Ints) -> "Coded":
        """These items."""
        return Coded(self.codes[rows], self.present[rows])


@dataclass(frozen=True, eq=False)
class Codebooks:
    """centroids: float32 [M, C, S, D / C]. weights: float32 [M], of the modalities, non-negative."""

    centroids: FloatArray
    weights: FloatArray

    def shares(self, present_NM: BoolArray) -> FloatArray:
        """The modalities' weights for each item [N, M]: they sum to 1, or to 0 for an item that has none."""
        weighed = self.weights * present_NM
        total = weighed.sum(axis=1, keepdims=True)
        shares: FloatArray = np.divide(weighed, total, out=np.zeros_like(weighed), where=total > 0)
        return shares

    def decode(self, items: Coded) -> FloatArray:
        """What the codes stand for, [N, M, D]; zero where a modality is absent."""
        return self._rows(items) * items.present[..., None]

    def fold(self, items: Coded) -> FloatArray:
        """One vector an item, Σ_m w_m C_m[code]: [N, D]."""
        folded: FloatArray = np.einsum("nm,nmd->nd", self.shares(items.present), self._rows(items))
        return folded

    def _rows(self, items: Coded) -> FloatArray:
        """The centroids behind all codes, [N, M, D]: one take, a sixth of the time of an index for each axis."""
        modalities, subspaces, size, width = self.centroids.shape
        starts = size * np.arange(modalities * subspaces, dtype=np.int32).reshape(modalities, subspaces)
        rows: FloatArray = self.centroids.reshape(-1, width).take(items.codes + starts, axis=0)
        return rows.reshape(len(items), modalities, subspaces * width)

    def tables(self, candidate: Coded) -> FloatArray:
        """Products of one candidate, folded, with every centroid: [M, C, S]."""
        _, subspaces, _, width = self.centroids.shape
        query_Cd = self.fold(candidate).reshape(subspaces, width)
        products: FloatArray = np.einsum("cd,mcsd->mcs", query_Cd, self.centroids)
        return products


def look_up(books: Codebooks, candidate: Coded, history: Coded) -> FloatArray:
    """Scores [T] of the events for one candidate, by T·M·C look-ups."""
    tables = books.tables(candidate)
    modalities, subspaces, size = tables.shape
    starts = np.arange(modalities * subspaces, dtype=np.int32) * size
    places = history.codes.reshape(len(history), modalities * subspaces) + starts
    found = tables.ravel().take(places).reshape(len(history), modalities, subspaces).sum(axis=2)
    scores: FloatArray = (found * books.shares(history.present)).sum(axis=1)
    return scores


def search(books: Codebooks, candidates: Coded, history: Coded, k: int) -> tuple[Ints, FloatArray]:
    """(places in the history, scores), each [N, min(k, T)]: the k events most like each candidate, best first.

    Of equal scores the event that comes first stays first. Neither candidates nor events need to have any content:
    their scores are 0 then.
    """
    return best(books.fold(candidates) @ books.fold(history).T, k)


def best(scores_NT: NDArray[np.floating], k: int) -> tuple[Ints, FloatArray]:
    """(places, scores) of the k highest of each row, highest first; of equal ones the first."""
    k = min(k, scores_NT.shape[1])
    if not (k and len(scores_NT)):
        return np.zeros((len(scores_NT), k), np.int64), np.zeros((len(scores_NT), k), scores_NT.dtype)
    least = np.partition(scores_NT, -k, axis=1)[:, -k]
    places = np.stack([_ranked(row, bound, k) for row, bound in zip(scores_NT, least, strict=True)])
    return places, np.take_along_axis(scores_NT, places, axis=1)


def _ranked(scores: NDArray[np.floating], bound: float, k: int) -> Ints:
    found = np.flatnonzero(scores >= bound)
    order: Ints = found[np.argsort(-scores[found], kind="stable")][:k]
    return order


def attention(scores_NK: NDArray[np.floating], temperature: float) -> FloatArray:
    """Softmax over the found events of each candidate, [N, K]: what a ranker weighs them with."""
    heights = np.exp((scores_NK - scores_NK.max(axis=1, keepdims=True, initial=-np.inf)) / temperature)
    shares: FloatArray = heights / np.maximum(heights.sum(axis=1, keepdims=True), 1e-30)
    return shares

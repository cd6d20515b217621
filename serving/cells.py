"""Vectors in memory: exact scans, and an inverted file whose cells are probed nearest first.

Shapes: V items, D dimensions, K interests. Vectors are kept in 16 bits, as Postgres keeps them; sums are 32-bit.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Up to here a scan is as fast as probing, and exact.
EXACT_ITEMS = 20_000
# Rows scored at once in a scan: what fits a core's cache.
BLOCK = 8192
# Recall of one interest's list that probing is tuned for, and the depth that it is measured at.
OBJECTIVE, DEPTH = 0.98, 100
# Training points per cell, and rounds of k-means: more changes nothing that can be measured.
POINTS, ROUNDS = 64, 8


class Cells:
    """The vectors of one generation. Below EXACT_ITEMS there are no cells, and faiss is never imported."""

    def __init__(self, vectors: NDArray[np.float16], probes: int | None = None) -> None:
        self._small: Floats | None = None
        self.items, self.dim = vectors.shape
        if self.items <= EXACT_ITEMS:
            self._small = vectors.astype(np.float32)
            self.count = self.probes = 1
            return
        self.count = int(2 * np.sqrt(self.items))
        self.probes = probes or max(8, self.count // 64)
        self._file = _inverted_file(vectors, self.count)

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        if self._small is not None:
            return self._small.nbytes
        held: int = self.items * (2 * self.dim + 16) + 4 * self.count * self.dim
        return held

    def vectors(self, positions: Ints) -> Floats:
        """Rows [P, D] in 32 bits."""
        if self._small is not None:
            return self._small[positions]
        found: Floats = self._file.reconstruct_batch(np.ascontiguousarray(positions, dtype=np.int64))
        return found

    def scan(self, interests: Floats, k: int, allowed: NDArray[np.bool_] | None) -> list[tuple[Ints, Floats]]:
        """The k best allowed items of each interest, exactly: (positions, scores), by score, then position."""
        positions = np.arange(self.items) if allowed is None else np.flatnonzero(allowed)
        scores = np.empty((len(interests), len(positions)), np.float32)
        for start in range(0, len(positions), BLOCK):
            end = start + BLOCK
            rows = self._small[start:end] if self._small is not None and allowed is None else None
            rows = self.vectors(positions[start:end]) if rows is None else rows
            np.matmul(interests, rows.T, out=scores[:, start:end])
        return self._best(interests, [positions[_nearly_first(row, k)] for row in scores], k)

    def scan_members(
        self, interests: Floats, k: int, members: Ints, rows: Floats, allowed: NDArray[np.bool_]
    ) -> list[tuple[Ints, Floats]]:
        """As scan(), over members whose rows [M, D] are at hand; of them those that are allowed."""
        scores = interests @ rows.T
        scores[:, ~allowed[members]] = -np.inf
        near = [_nearly_first(row, k) for row in scores]
        return self._best(interests, [members[n[row[n] > -np.inf]] for n, row in zip(near, scores, strict=True)], k)

    def tune(self, interests: Floats) -> float:
        """Sets how many cells are probed so that these interests [Q, D] are answered well; returns their recall then.

        Where the nearest quarter of the cells is not enough, all are: probing would miss what a scan costs no more for.
        """
        if self._small is not None or not len(interests):
            return 1.0
        truth = self.scan(interests, DEPTH, None)
        self.probes = 4
        while self.probes < self.count:
            found = self.probe(interests, DEPTH, None, 1)
            pairs = zip(found, truth, strict=True)
            recall = float(np.mean([np.mean(scores >= best[-1]) for (_, scores), (_, best) in pairs]))
            if recall >= OBJECTIVE:
                return recall
            self.probes = self.probes * 3 // 2 if self.probes * 6 <= self.count else self.count
        return 1.0

    def probe(
        self, interests: Floats, k: int, allowed: NDArray[np.bool_] | None, sparseness: float
    ) -> list[tuple[Ints, Floats]]:
        """As scan(), but only in the nearest cells; all of them where fewer do not hold k allowed items.

        sparseness: items per allowed item; the sparser, the more cells.
        """
        import faiss

        probes = min(self.count, int(np.ceil(self.probes * sparseness)))
        selector, bits = None, None
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")  # must outlive the search
            selector = faiss.IDSelectorBitmap(self.items, faiss.swig_ptr(bits))
        while True:
            parameters: Any = faiss.SearchParametersIVF()
            parameters.nprobe, parameters.sel = probes, selector
            _, positions = self._file.search(interests, k, params=parameters)
            if probes == self.count or (positions[:, -1] >= 0).all():
                break
            probes = min(self.count, 4 * probes)
        return self._best(interests, [row[row >= 0] for row in positions], k)

    def _best(self, interests: Floats, found: list[Ints], k: int) -> list[tuple[Ints, Floats]]:
        """The k best of what was found for each interest, by scores that are the same whoever computes them."""
        lengths = [len(positions) for positions in found]
        rows = self.vectors(np.concatenate(found))
        scores = inner_products(rows, np.repeat(interests, lengths, axis=0))
        best = []
        for positions, each in zip(found, np.split(scores, np.cumsum(lengths)[:-1]), strict=True):
            order = np.lexsort((positions, -each))[:k]
            best.append((positions[order], each[order]))
        return best


def inner_products(rows: Floats, vectors: Floats) -> Floats:
    """Scores [P] of rows [P, D] with vectors [P, D] or [D], to the last bit as pgvector computes them on x86.

    That is, for halfvec: eight sums side by side.

    Matrix products add in another order, and a score should not depend on who computed it. Products of 16-bit floats
    are exact in 32 bits, so that fused and separate additions are the same. (Elsewhere the last bit may differ.)
    """
    products = rows * vectors
    whole = products.shape[1] // 8 * 8
    lanes = np.zeros((len(rows), 8), np.float32)
    for start in range(0, whole, 8):
        lanes += products[:, start : start + 8]
    quads = lanes[:, :4] + lanes[:, 4:]
    pairs = quads[:, :2] + quads[:, 2:]
    sums: Floats = pairs[:, 0] + pairs[:, 1]
    for column in products.T[whole:]:
        sums += column
    return sums


def _nearly_first(scores: Floats, k: int) -> Ints:
    """Numbers of the k largest scores, of all that equal the last of them, and of those within a rounding of it."""
    if len(scores) <= k:
        return np.arange(len(scores))
    bar = np.partition(scores, len(scores) - k)[len(scores) - k]
    margin = np.float32(1e-5) * max(np.float32(1), abs(bar)) if np.isfinite(bar) else np.float32(0)
    return np.flatnonzero(scores >= bar - margin)


def _inverted_file(vectors: NDArray[np.float16], cells: int) -> Any:
    import faiss

    faiss.omp_set_num_threads(1)
    items, dim = vectors.shape
    quantizer: Any = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, dim, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    quantizer.this.disown()
    index.own_fields = True
    # The codes are the stored values themselves, not what is left of them beside the cell's centre.
    index.by_residual = False
    index.cp.niter, index.cp.spherical = ROUNDS, True
    sample = np.random.default_rng(0).choice(items, min(items, POINTS * cells), replace=False)
    index.train(vectors[np.sort(sample)].astype(np.float32))
    for start in range(0, items, BLOCK):
        index.add(vectors[start : start + BLOCK].astype(np.float32))
    index.make_direct_map()
    return index

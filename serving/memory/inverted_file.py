"""Vectors in memory: exact scans, and an inverted file whose cells are probed nearest first.

Shapes: V items, D dimensions, K interests. Vectors are kept in 16 bits, as Postgres keeps them; sums are 32-bit.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Up to here a scan is as fast as probing, and exact.
EXACT_ITEMS = 20_000
# Rows scored at once in a scan: what fits a core's cache.
BLOCK = 8192
# Recall of one interest's list that probing is tuned for, and the depth that it is measured at.
OBJECTIVE, DEPTH = 0.98, 100
# Training points per cell, and rounds of k-means: more changes nothing that can be measured.
POINTS, ROUNDS = 64, 8


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


class Cells:
    """The vectors of one generation. Below EXACT_ITEMS there are no cells, and faiss is never imported."""

    def __init__(self, vectors: NDArray[np.float16], probes: int | None = None) -> None:
        self.threads = 1  # of a search
        self._small: Floats | None = None
        self.items, self.dim = vectors.shape
        if self.items <= EXACT_ITEMS:
            self._small = vectors.astype(np.float32)
            self.count = self.probes = 1
            return
        self.count = int(2 * np.sqrt(self.items))
        self.probes = probes or max(8, self.count // 64)
        self._file, self._block = _readable(_inverted_file(vectors, self.count))
        self._codec = _codec(self.dim)
        # Where each item's values begin in the block; a record is that many bytes from any place on.
        self._starts = _starts(self._file, self._block, self.items)
        size = 2 * self.dim
        self._records = np.ndarray((len(self._block) - size + 1,), f"V{size}", self._block, strides=(1,))

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
        found = self._records[self._starts[positions]].view(np.uint8)
        decoded: Floats = self._codec.decode(found.reshape(-1, 2 * self.dim))
        return decoded

    @property
    def searched(self) -> int:
        """About how many rows an unrestricted search scores for each interest."""
        return int(self.items * self.probes / self.count)

    def scan(self, interests: Floats, k: int, allowed: Mask | None) -> Lists:
        """The k best allowed items of each interest, exactly."""
        positions = np.arange(self.items) if allowed is None else np.flatnonzero(allowed)
        scores = np.empty((len(interests), len(positions)), np.float32)
        for start in range(0, len(positions), BLOCK):
            end = start + BLOCK
            rows = self._small[start:end] if self._small is not None and allowed is None else None
            rows = self.vectors(positions[start:end]) if rows is None else rows
            np.matmul(interests, rows.T, out=scores[:, start:end])
        interest, near = _nearly_best(scores, k)
        return _ranked(interests, interest, positions[near], self.vectors(positions[near]), k)

    def scan_members(self, interests: Floats, k: int, members: Ints, rows: Floats, allowed: Mask) -> Lists:
        """As scan(), over members whose rows [M, D] are at hand; of them those that are allowed."""
        scores = interests @ rows.T
        scores[:, ~allowed[members]] = -np.inf
        interest, near = _nearly_best(scores, k)
        return _ranked(interests, interest, members[near], rows[near], k)

    def tune(self, interests: Floats) -> float:
        """Sets how many cells are probed so that these interests [Q, D] are answered well; returns their recall then.

        Where the nearest quarter of the cells is not enough, all are: probing would miss what a scan costs no more for.
        """
        if self._small is not None or not len(interests):
            return 1.0
        truth = self.scan(interests, DEPTH, None).split(len(interests))
        self.probes = 4
        while self.probes < self.count:
            found = self.probe(interests, DEPTH, None, 1).split(len(interests))
            pairs = zip(found, truth, strict=True)
            recall = float(np.mean([np.mean(scores >= best[-1]) for (_, scores), (_, best) in pairs]))
            if recall >= OBJECTIVE:
                return recall
            self.probes = self.probes * 3 // 2 if self.probes * 6 <= self.count else self.count
        return 1.0

    def probe(self, interests: Floats, k: int, allowed: Mask | None, sparseness: float) -> Lists:
        """As scan(), but only in the nearest cells; all of them where fewer do not hold k allowed items.

        sparseness: items per allowed item; the sparser, the more cells.
        """
        import faiss

        # OpenMP would take all processors, and each thread that calls has its own word on it. Threads that wait for the
        # next search spin: with a search of a quarter of a millisecond they take longer from others than they give.
        faiss.omp_set_num_threads(self.threads)
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
        found = np.flatnonzero(positions >= 0)
        near = positions.ravel()[found]
        return _ranked(interests, found // k, near, self.vectors(near), k)


def _ranked(interests: Floats, interest: Ints, positions: Ints, rows: Floats, k: int) -> Lists:
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
    return index


def _readable(index: Any) -> tuple[Any, NDArray[np.uint8]]:
    """The same index over one block of bytes, which numpy reads too: faiss hands out single vectors slowly."""
    import faiss

    writer = faiss.VectorIOWriter()
    faiss.write_index(index, writer)
    block: NDArray[np.uint8] = faiss.vector_to_array(writer.data)
    reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(block), len(block))  # type: ignore[attr-defined]
    return faiss.read_index(reader), block


def _codec(dim: int) -> Any:
    """Reads codes in half of numpy's time for 16-bit floats."""
    import faiss

    return faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)


def _starts(index: Any, block: NDArray[np.uint8], items: int) -> Ints:
    """Where in the block the code of each item begins."""
    import faiss

    starts = np.empty(items, np.int64)
    lists = faiss.downcast_InvertedLists(index.invlists)
    for cell in range(index.nlist):
        if size := lists.list_size(cell):
            first = faiss.rev_swig_ptr(lists.get_codes(cell), 1).ctypes.data - block.ctypes.data
            assert 0 <= first <= len(block) - size * index.code_size, "the index is not where it was read from"
            starts[faiss.rev_swig_ptr(lists.get_ids(cell), size)] = first + index.code_size * np.arange(size)
    return starts

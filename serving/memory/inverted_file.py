"""The vector index of large catalogues: an inverted file (faiss) whose cells are probed nearest first.

Its codes are the stored 16-bit values themselves, so that scores are exact and only the choice of items is not.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.memory.interest_lists import Floats, Ints, Lists, Mask, ranked, scan

# Recall of one interest's list that probing is tuned for, and the depth that it is measured at.
OBJECTIVE, DEPTH = 0.98, 100
# Training points per cell, and rounds of k-means: more changes nothing that can be measured.
POINTS, ROUNDS = 64, 8
# Rows added at once.
BLOCK = 8192


class InvertedFile:
    """The vectors of one generation, of at least one item."""

    def __init__(self, vectors: NDArray[np.float16], probes: int | None = None) -> None:
        self.threads = 1  # of a search
        self.items, self.dim = vectors.shape
        self.count = min(self.items, int(2 * np.sqrt(self.items)))
        self.probes = min(self.count, probes or max(8, self.count // 64))
        self._file, self._block = _readable(_inverted_file(vectors, self.count))
        self._codec = _codec(self.dim)
        # Where each item's values begin in the block; a record is that many bytes from any place on.
        self._starts = _starts(self._file, self._block, self.items)
        size = 2 * self.dim
        self._records = np.ndarray((len(self._block) - size + 1,), f"V{size}", self._block, strides=(1,))

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        held: int = self.items * (2 * self.dim + 16) + 4 * self.count * self.dim
        return held

    @property
    def searched(self) -> int:
        """About how many rows an unrestricted search scores for each interest."""
        return int(self.items * self.probes / self.count)

    def vectors(self, positions: Ints | slice) -> Floats:
        """Rows [P, D] in 32 bits."""
        found = self._records[self._starts[positions]].view(np.uint8)
        decoded: Floats = self._codec.decode(found.reshape(-1, 2 * self.dim))
        return decoded

    def scan(self, interests: Floats, k: int, allowed: Mask | None) -> Lists:
        """The k best allowed items of each interest, exactly."""
        return scan(self.vectors, self.items, interests, k, allowed)

    def tune(self, interests: Floats) -> float:
        """Sets how many cells are probed so that these interests [Q, D] are answered well; returns their recall then.

        Where the nearest quarter of the cells is not enough, all are: probing would miss what a scan costs no more for.
        """
        if not len(interests):
            return 1.0
        truth = self.scan(interests, DEPTH, None).split(len(interests))
        self.probes = min(self.count, 4)
        while self.probes < self.count:
            # One by one: where one of a batch finds too few, all of them are given more cells.
            found = [self.probe(interest[None], DEPTH, None, 1).score for interest in interests]
            pairs = zip(found, truth, strict=True)
            recall = float(np.mean([np.mean(scores >= best[-1]) for scores, (_, best) in pairs]))
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
        return ranked(interests, found // k, near, self.vectors(near), k)


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
    index.cp.min_points_per_centroid = 1  # fewer than usual make faiss warn, and nothing else
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

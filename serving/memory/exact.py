"""The vector index of small catalogues: every search is a scan."""

import numpy as np
from numpy.typing import NDArray

from serving.memory.interest_lists import Floats, Ints, Lists, Mask, scan


class Exact:
    """The vectors of one generation in 32 bits. faiss is never imported."""

    def __init__(self, vectors: NDArray[np.float16]) -> None:
        self.threads = 1
        self.items = len(vectors)
        self._rows: Floats = vectors.astype(np.float32)

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return self._rows.nbytes

    @property
    def searched(self) -> int:
        """How many rows an unrestricted search scores for each interest: all."""
        return self.items

    def vectors(self, positions: Ints | slice) -> Floats:
        """Rows [P, D] in 32 bits."""
        rows: Floats = self._rows[positions]
        return rows

    def tune(self, interests: Floats) -> float:  # noqa: ARG002 of the protocol
        """There is nothing to set; the recall is 1."""
        return 1.0

    def scan(self, interests: Floats, k: int, allowed: Mask | None) -> Lists:
        """The k best allowed items of each interest, exactly."""
        return scan(self.vectors, self.items, interests, k, allowed)

    def probe(self, interests: Floats, k: int, allowed: Mask | None, sparseness: float) -> Lists:  # noqa: ARG002
        """As scan()."""
        return self.scan(interests, k, allowed)

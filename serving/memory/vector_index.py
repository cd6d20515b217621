"""What a server can search in memory with: the protocol of vector indexes, and those that exist."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from polytower.errors import UserError
from serving.memory.exact import Exact
from serving.memory.interest_lists import Floats, Ints, Lists, Mask
from serving.memory.inverted_file import InvertedFile

# Up to here a scan is as fast as probing, and exact.
EXACT_ITEMS = 20_000


class VectorIndex(Protocol):
    """The vectors of one generation, V items in ascending order of their id's bytes.

    Lists come by score, then position; scores are inner_products(), whoever computes them.
    """

    threads: int  # that a search may take

    @property
    def bytes(self) -> int:
        """What it holds in memory."""

    @property
    def searched(self) -> int:
        """About how many rows an unrestricted search scores for each interest."""

    def vectors(self, positions: Ints | slice) -> Floats:
        """Rows [P, D] in 32 bits, as they are stored."""

    def scan(self, interests: Floats, k: int, allowed: Mask | None) -> Lists:
        """The k best allowed items of each interest [K, D], exactly. allowed: bool [V]; None: all."""

    def probe(self, interests: Floats, k: int, allowed: Mask | None, sparseness: float) -> Lists:
        """As scan(), by less work: nearly the best. k items wherever k are allowed.

        sparseness: items per allowed item.
        """

    def tune(self, interests: Floats) -> float:
        """Sets probe() so that these interests [Q, D] are answered well enough; returns their recall then."""


VECTOR_INDEXES: Mapping[str, Callable[[NDArray[np.float16]], VectorIndex]] = {
    "exact": Exact,
    "inverted_file": InvertedFile,
}


def check_kind(kind: str | None) -> None:
    """Raises UserError for a name that no vector index has. None: chosen by size."""
    if kind is not None and kind not in VECTOR_INDEXES:
        raise UserError(f"POLYTOWER_VECTOR_INDEX={kind!r} is not a vector index; there are {', '.join(VECTOR_INDEXES)}")


def make_vector_index(vectors: NDArray[np.float16], kind: str | None = None) -> VectorIndex:
    """The index of this kind over vectors [V, D]; None: exact up to EXACT_ITEMS, as is one of no items."""
    by_size = "exact" if len(vectors) <= EXACT_ITEMS else "inverted_file"
    return VECTOR_INDEXES[(kind or by_size) if len(vectors) else "exact"](vectors)

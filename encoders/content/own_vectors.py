"""The user's own embeddings as content: nothing is computed but their direction."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from encoders.content.encoder import Encoded, Rows
from polytower.errors import UserError

SCHEME = "own-vectors-v1"


class OwnVectors:
    """Unit vectors of what a column of the items holds.

    model: "column/width", as the load wrote it (`items.vector_model`). Contents are lists of that many numbers.
    Raises UserError for a name that tells no width.
    """

    modality = "vector"
    device = "cpu"

    def __init__(self, model: str) -> None:
        column, _, width = model.rpartition("/")
        if not column or not width.isdecimal() or not int(width):
            raise UserError(
                f"own vectors are read from a column: `polytower load DIR --vectors COLUMN` (there is no default, and"
                f" {model!r} is no column/width)"
            )
        self.model = model
        self.dim = int(width)
        self.config = {"scheme": SCHEME, "column": column, "dim": self.dim}
        self.revision = hashlib.sha256(f"{SCHEME}/{model}".encode()).hexdigest()[:12]

    def encode(self, contents: Sequence[Any], batch_size: int | None = None) -> Iterator[Rows]:
        """Unit rows [b, dim] in the order of the contents."""
        size = batch_size or max(1, len(contents))
        for start in range(0, len(contents), size):
            yield self._unit(contents[start : start + size])

    def encode_chunks(self, chunks: Iterable[Sequence[Any]]) -> Iterator[Encoded]:
        """One result per chunk; what the load took does not fail."""
        return (Encoded(self._unit(chunk)) for chunk in chunks)

    def _unit(self, contents: Sequence[Any]) -> Rows:
        rows = np.array(contents, np.float64).reshape(len(contents), self.dim)
        units: Rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        return units

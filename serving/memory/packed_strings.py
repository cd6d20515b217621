"""Many short strings in few bytes: one block of UTF-8 and where each string ends."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Texts:
    """V strings, some of them missing (None). Takes 4 bytes a string and its UTF-8, where Python's own take 60 more."""

    def __init__(self, content: bytes, lengths: NDArray[np.int32]) -> None:
        """lengths: bytes of each string, -1 for None."""
        self._content = content
        self._missing = lengths < 0
        self._ends = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0))]).astype(np.uint32)

    def __len__(self) -> int:
        return len(self._missing)

    @property
    def bytes(self) -> int:
        """What it holds, in bytes."""
        return len(self._content) + self._ends.nbytes + self._missing.nbytes

    def at(self, positions: Sequence[int] | NDArray[np.int64]) -> list[str | None]:
        """The strings at these positions."""
        chosen = np.asarray(positions, dtype=np.int64)
        starts, ends = self._ends[chosen].tolist(), self._ends[chosen + 1].tolist()
        missing = self._missing[chosen].tolist()
        content = self._content
        return [
            None if gone else content[start:end].decode()
            for start, end, gone in zip(starts, ends, missing, strict=True)
        ]


class Ids:
    """V different strings, none missing, and the way back: position of a string. 12 bytes an id beside its text."""

    def __init__(self, texts: Texts) -> None:
        """Raises ValueError for two ids of one hash (64 bits, other ones in every process)."""
        self._texts = texts
        hashes = np.array([hash(text) for text in texts.at(np.arange(len(texts)))], dtype=np.int64)
        self._order = np.argsort(hashes).astype(np.int32)
        self._hashes = hashes[self._order]
        if len(hashes) > 1 and not np.diff(self._hashes).all():
            raise ValueError("two item ids have one hash")

    def __len__(self) -> int:
        return len(self._order)

    @property
    def bytes(self) -> int:
        """What it holds, in bytes."""
        return self._texts.bytes + self._order.nbytes + self._hashes.nbytes

    def at(self, positions: NDArray[np.int64]) -> list[str]:
        """The ids at these positions."""
        return [text for text in self._texts.at(positions) if text is not None]

    def positions(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """The position of each id, -1 for an unknown one."""
        if not ids or not len(self):
            return np.full(len(ids), -1, np.int64)
        hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self) - 1)
        found = np.where(self._hashes[places] == hashes, self._order[places], -1).astype(np.int64)
        known = np.flatnonzero(found >= 0).tolist()
        wrong = [n for n, text in zip(known, self.at(found[known]), strict=True) if text != ids[n]]
        found[wrong] = -1
        return found

"""The item embeddings of one generation in memory, searched for several interests at once.

Answers as the SQL functions do (migrations/sql/retrieve_vectors_v1.sql), item for item where both are exact. Small
catalogues and selective filters are scanned, exactly; large ones are searched in the nearest cells of an inverted file
(faiss) whose codes are the stored 16-bit values themselves, so that scores are exact and only the choice is not.
docs/adr/0007 has the measurements. Nothing here writes: a new generation, or new attributes, make a new index.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.memory.inverted_file import EXACT_ITEMS, Cells, Floats, Ints, Lists, Mask
from serving.memory.merges import MERGES, Question, provenance
from serving.memory.packed_strings import Ids, Texts
from serving.memory.postings import Postings
from serving.queries import Candidates, Found

# Selective filters whose items are kept at hand, at most EXACT_ITEMS each.
FILTERS = 4
# Weights that Postgres takes for certain: finite in 32 bits, and some of them not rounded to zero.
LARGEST, SMALLEST = 3e38, 1e-37
# Products of two numbers that take a core three milliseconds at most.
QUICK = 4_000_000


@dataclass(frozen=True)
class Asked:
    """One question to an index.

    interests: float32 [K, D], as 16 bits hold them; numbers: what candidates call them; weights: [K], None for equal;
    allow: None for all items; diversity: {"attribute": text, "weight": number}, with the merge `diverse` only.
    titles and found_by: whether candidates come with them.
    """

    interests: Floats
    numbers: Sequence[int]
    weights: Sequence[float] | None
    k: int
    filter: Mapping[str, Any]
    exclude: Sequence[str]
    merge: str
    allow: Sequence[str] | None = None
    diversity: Mapping[str, Any] | None = None
    titles: bool = False
    found_by: bool = True


class ItemIndex:
    """Items in ascending order of their id's bytes: the position in that order is what ties are broken by.

    version: of items (attributes, availability, titles) when it was filled; see migration 0010.
    """

    def __init__(
        self,
        generation: int,
        version: int,
        vectors: NDArray[np.float16],
        ids: Ids,
        titles: Texts,
        available: Mask,
        postings: Postings,
        sample: Floats | None = None,
    ) -> None:
        """vectors: [V, D]. sample: interests [Q, D] that the search is tuned with."""
        self.generation = generation
        self.version = version
        self.dim = vectors.shape[1]
        self._ids = ids
        self._titles = titles
        self._available = available
        self._postings = postings
        self._all_available = bool(available.all())
        self._lock = Lock()
        self._filtered: dict[str, tuple[Ints, Floats]] = {}
        self.cells = Cells(vectors)
        self.recall = 1.0 if sample is None else self.cells.tune(sample)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        held = self._ids.bytes + self._titles.bytes + self._available.nbytes
        return held + self._postings.bytes + self.cells.bytes

    def quick(self, asked: Asked) -> bool:
        """Whether the answer takes so little that handing it to a thread would cost as much."""
        return (
            not asked.filter
            and asked.allow is None
            and asked.merge != "diverse"
            and asked.interests.size * max(self.cells.searched, 2 * asked.k) <= QUICK
        )

    def answer(self, asked: Asked) -> Candidates | None:
        """Candidates, best first. None: only Postgres knows (see Postings), or the question has a fault to name."""
        if asked.interests.shape[1:] != (self.dim,) or not self._readable(asked):
            return None
        wanted = self._postings.mask(asked.filter) if asked.filter else None
        merge = self._question(asked)
        if merge is None or (asked.filter and wanted is None):
            return None
        lists = self._search(asked, self._allowed(asked, wanted))
        merged = MERGES[asked.merge](lists, merge)
        return self._written(lists, merged.row, merged.score, asked)

    def vectors(self, item_ids: Sequence[str]) -> list[NDArray[np.float32] | None]:
        """The embedding of each item, None for items that the generation does not know."""
        positions = self._ids.positions(item_ids)
        rows = iter(self.cells.vectors(positions[positions >= 0]))
        return [next(rows) if position >= 0 else None for position in positions]

    def _readable(self, asked: Asked) -> bool:
        weights = _weights(asked)
        return (
            1 <= asked.k <= 1000
            and 1 <= len(asked.interests) <= 64
            and len(weights) == len(asked.interests)
            and all(0 <= weight <= LARGEST for weight in weights)
            and any(weight >= SMALLEST for weight in weights)
            and asked.merge in MERGES
            and (asked.merge == "diverse") == (asked.diversity is not None)
        )

    def _question(self, asked: Asked) -> Question | None:
        if asked.diversity is None:
            return Question(asked.k, _weights(asked))
        attribute, weight = str(asked.diversity["attribute"]), float(asked.diversity["weight"])
        if not self._postings.knows(attribute):
            return None
        return Question(
            asked.k, _weights(asked), weight, lambda positions: self._postings.categories(attribute, positions)
        )

    def _allowed(self, asked: Asked, wanted: Mask | None) -> Mask | None:
        """Which items may be answered; None: all. wanted: those that the filter leaves, None for no filter."""
        if wanted is None and asked.allow is None and not asked.exclude and self._all_available:
            return None
        allowed: Mask = self._available.copy() if wanted is None else self._available & wanted
        if asked.allow is not None:
            listed = np.zeros(len(self), bool)
            positions = self._ids.positions(asked.allow)
            listed[positions[positions >= 0]] = True
            allowed &= listed
        if asked.exclude:
            positions = self._ids.positions(asked.exclude)
            allowed[positions[positions >= 0]] = False
        return allowed

    def _search(self, asked: Asked, allowed: Mask | None) -> Lists:
        count = len(self) - len(asked.exclude)
        if allowed is not None and (asked.filter or asked.allow is not None):
            count = int(np.count_nonzero(allowed))
            if asked.allow is None and count <= EXACT_ITEMS < len(self):
                return self.cells.scan_members(asked.interests, asked.k, *self._members(asked.filter), allowed)
        if count <= EXACT_ITEMS or len(self) <= EXACT_ITEMS:
            return self.cells.scan(asked.interests, asked.k, allowed)
        return self.cells.probe(asked.interests, asked.k, allowed, len(self) / count)

    def _members(self, wanted: Mapping[str, Any]) -> tuple[Ints, Floats]:
        """What a selective filter leaves, with its vectors: the same few filters come again and again."""
        key = json.dumps(wanted, sort_keys=True)
        with self._lock:
            kept = self._filtered.pop(key, None)
            if kept is not None:
                self._filtered[key] = kept  # the newest use last
                return kept
        mask = self._postings.mask(wanted)
        assert mask is not None
        positions = np.flatnonzero(mask & self._available)
        made = positions, self.cells.vectors(positions)
        with self._lock:
            self._filtered[key] = made
            while len(self._filtered) > FILTERS:
                self._filtered.pop(next(iter(self._filtered)))
        return made

    def _written(self, lists: Lists, rows: Ints, scores: Floats, asked: Asked) -> Candidates:
        positions = lists.position[rows]
        numbers = np.asarray(asked.numbers)[lists.interest]
        return Candidates(
            self.generation,
            self._ids.at(positions),
            scores,
            numbers[rows],
            lists.rank[rows],
            _found(lists, rows, numbers) if asked.found_by else None,
            self._titles.at(positions) if asked.titles else None,
        )


def _found(lists: Lists, rows: Ints, numbers: Ints) -> Found:
    found, ends = provenance(lists, rows)
    return Found(numbers[found], lists.rank[found], lists.score[found], ends)


def _weights(asked: Asked) -> Sequence[float]:
    return [1.0] * len(asked.interests) if asked.weights is None else asked.weights

"""The item embeddings of one generation in memory, searched for several interests at once.

Answers as the SQL functions do (migrations/sql/retrieve_vectors_v2.sql), item for item where both are exact. Small
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

from serving.cells import EXACT_ITEMS, Cells
from serving.merges import MERGES, Floats, Ints, Lists, Question, provenance
from serving.postings import Mask, Postings
from serving.queries import Candidate
from serving.texts import Ids, Texts

# Selective filters whose items are kept at hand, at most EXACT_ITEMS each.
FILTERS = 4


@dataclass(frozen=True)
class Asked:
    """One question to an index.

    interests: float32 [K, D], as 16 bits hold them; numbers: what candidates call them; weights: [K], None for equal;
    allow: None for all items; diversity: {"attribute": text, "weight": number}, with the merge `diverse` only.
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

    def answer(self, asked: Asked, *, exact: bool = False) -> list[Candidate] | None:
        """Candidates, best first. None: only Postgres knows (see Postings), or the question has a fault to name."""
        if asked.interests.shape[1:] != (self.dim,) or not self._readable(asked):
            return None
        allowed = self._allowed(asked)
        if allowed is None:
            return None
        merge = self._question(asked)
        if merge is None:
            return None
        lists = Lists.of(self._search(asked, allowed, exact=exact))
        merged = MERGES[asked.merge](lists, merge)
        return self._written(lists, merged.row, merged.score, asked.numbers)

    def vectors(self, item_ids: Sequence[str]) -> list[NDArray[np.float32] | None]:
        """The embedding of each item, None for items that the generation does not know."""
        positions = self._ids.positions(item_ids)
        rows = iter(self.cells.vectors(positions[positions >= 0]))
        return [next(rows) if position >= 0 else None for position in positions]

    def _readable(self, asked: Asked) -> bool:
        weights = np.asarray(_weights(asked), dtype=np.float32)
        return (
            1 <= asked.k <= 1000
            and 1 <= len(asked.interests) <= 64
            and len(weights) == len(asked.interests)
            and bool(np.isfinite(weights).all() and (weights >= 0).all() and weights.any())
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

    def _allowed(self, asked: Asked) -> Mask | None:
        """Which items may be answered; None: Postgres knows."""
        allowed = self._available.copy()
        if asked.filter:
            wanted = self._postings.mask(asked.filter)
            if wanted is None:
                return None
            allowed &= wanted
        if asked.allow is not None:
            listed = np.zeros(len(self), bool)
            positions = self._ids.positions(asked.allow)
            listed[positions[positions >= 0]] = True
            allowed &= listed
        if asked.exclude:
            positions = self._ids.positions(asked.exclude)
            allowed[positions[positions >= 0]] = False
        return allowed

    def _search(self, asked: Asked, allowed: Mask, *, exact: bool) -> list[tuple[Ints, Floats]]:
        restricted = bool(asked.filter) or asked.allow is not None
        free = not restricted and not asked.exclude and self._all_available
        count = int(np.count_nonzero(allowed)) if restricted else len(self) - len(asked.exclude)
        if asked.filter and asked.allow is None and count <= EXACT_ITEMS < len(self):
            return self.cells.scan_members(asked.interests, asked.k, *self._members(asked.filter), allowed)
        if exact or count <= EXACT_ITEMS or len(self) <= EXACT_ITEMS:
            return self.cells.scan(asked.interests, asked.k, None if free else allowed)
        return self.cells.probe(asked.interests, asked.k, None if free else allowed, len(self) / count)

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

    def _written(self, lists: Lists, rows: Ints, scores: Floats, numbers: Sequence[int]) -> list[Candidate]:
        positions = lists.position[rows]
        columns = zip(
            self._ids.at(positions),
            scores.tolist(),
            lists.interest[rows].tolist(),
            lists.rank[rows].tolist(),
            (
                (*by, title)
                for by, title in zip(provenance(lists, rows, numbers), self._titles.at(positions), strict=True)
            ),
            strict=True,
        )
        return [
            Candidate(item_id, score, rank, numbers[interest], interest_rank, self.generation, *found)
            for rank, (item_id, score, interest, interest_rank, found) in enumerate(columns, 1)
        ]


def _weights(asked: Asked) -> Sequence[float]:
    return [1.0] * len(asked.interests) if asked.weights is None else asked.weights

"""The item embeddings of one generation in memory, searched for several interests at once.

Answers as the SQL functions do (migrations/sql/retrieve_vectors_v1.sql), item for item where both are exact. Small
catalogues and selective filters are scanned, exactly; large ones are probed, as their vector index does that.
docs/adr/0007 has the measurements. Nothing here writes: a new generation, or new attributes, make a new index.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.memory.interest_lists import Floats, Ints, Lists, Mask, scan_members
from serving.memory.merges import MERGES, MergeContext, provenance
from serving.memory.packed_strings import Ids, Texts
from serving.memory.postings import Postings
from serving.memory.vector_index import EXACT_ITEMS, make_vector_index
from serving.queries import Candidates, Found
from serving.question import Interests, Question

# Selective filters whose items are kept at hand, at most EXACT_ITEMS each.
FILTERS = 4
# Weights that Postgres takes for certain: finite in 32 bits, and some of them not rounded to zero.
LARGEST, SMALLEST = 3e38, 1e-37
# Products of two numbers that take a core three milliseconds at most.
QUICK = 4_000_000


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
        kind: str | None = None,
    ) -> None:
        """vectors: [V, D]. sample: interests [Q, D] that the search is tuned with. kind: of make_vector_index."""
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
        self.vector_index = make_vector_index(vectors, kind)
        self.recall = 1.0 if sample is None else self.vector_index.tune(sample)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        held = self._ids.bytes + self._titles.bytes + self._available.nbytes
        return held + self._postings.bytes + self.vector_index.bytes

    def quick(self, question: Question, interests: Interests) -> bool:
        """Whether the answer takes so little that handing it to a thread would cost as much."""
        vectors_KD = interests.matrix
        if vectors_KD is None or question.filter or question.allow is not None or question.merge == "diverse":
            return vectors_KD is None
        return vectors_KD.size * max(self.vector_index.searched, 2 * question.k) <= QUICK

    def answer(self, question: Question, interests: Interests) -> Candidates | None:
        """Candidates, best first. None: only Postgres knows (see Postings), or the question has a fault to name."""
        vectors_KD = interests.matrix
        if question.searched_space != "item" or vectors_KD is None or vectors_KD.shape[1:] != (self.dim,):
            return None
        weights = [1.0] * len(vectors_KD) if interests.weights is None else interests.weights
        if not self._answerable(question, len(vectors_KD), weights):
            return None
        wanted = self._postings.mask(question.filter) if question.filter else None
        context = self._merge_context(question, weights)
        if context is None or (question.filter and wanted is None):
            return None
        exclude = [*question.exclude, *interests.banned]
        lists = self._search(vectors_KD, question, len(exclude), self._allowed(question, exclude, wanted))
        merged = MERGES[question.merge](lists, context)
        numbers = np.asarray(interests.numbers)[lists.interest]
        return self._candidates(lists, merged.row, merged.score, numbers, question)

    def vectors(self, item_ids: Sequence[str]) -> list[NDArray[np.float32] | None]:
        """The embedding of each item, None for items that the generation does not know."""
        positions = self._ids.positions(item_ids)
        rows = iter(self.vector_index.vectors(positions[positions >= 0]))
        return [next(rows) if position >= 0 else None for position in positions]

    def _answerable(self, question: Question, interests: int, weights: Sequence[float]) -> bool:
        return (
            1 <= interests <= 64
            and len(weights) == interests
            and all(0 <= weight <= LARGEST for weight in weights)
            and any(weight >= SMALLEST for weight in weights)
            and question.merge in MERGES
            and (question.merge == "diverse") == (question.diversity is not None)
        )

    def _merge_context(self, question: Question, weights: Sequence[float]) -> MergeContext | None:
        """None: the attribute of `diverse` is one that only Postgres knows."""
        if question.diversity is None:
            return MergeContext(question.k, weights)
        attribute = question.diversity.attribute
        if not self._postings.knows(attribute):
            return None
        categories = partial(self._postings.categories, attribute)
        return MergeContext(question.k, weights, question.diversity.weight, categories)

    def _allowed(self, question: Question, exclude: Sequence[str], wanted: Mask | None) -> Mask | None:
        """Which items may be answered; None: all. wanted: those that the filter leaves, None for no filter."""
        if wanted is None and question.allow is None and not exclude and self._all_available:
            return None
        allowed: Mask = self._available.copy() if wanted is None else self._available & wanted
        if question.allow is not None:
            listed = np.zeros(len(self), bool)
            positions = self._ids.positions(question.allow)
            listed[positions[positions >= 0]] = True
            allowed &= listed
        if exclude:
            positions = self._ids.positions(exclude)
            allowed[positions[positions >= 0]] = False
        return allowed

    def _search(self, interests: Floats, question: Question, excluded: int, allowed: Mask | None) -> Lists:
        count = len(self) - excluded
        if allowed is not None and (question.filter or question.allow is not None):
            count = int(np.count_nonzero(allowed))
            if question.allow is None and count <= EXACT_ITEMS < len(self):
                return scan_members(interests, question.k, *self._members(question.filter), allowed)
        if count <= EXACT_ITEMS:
            return self.vector_index.scan(interests, question.k, allowed)
        return self.vector_index.probe(interests, question.k, allowed, len(self) / count)

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
        made = positions, self.vector_index.vectors(positions)
        with self._lock:
            self._filtered[key] = made
            while len(self._filtered) > FILTERS:
                self._filtered.pop(next(iter(self._filtered)))
        return made

    def _candidates(self, lists: Lists, rows: Ints, scores: Floats, numbers: Ints, question: Question) -> Candidates:
        """numbers: what candidates call the interest of each row of the lists."""
        positions = lists.position[rows]
        return Candidates(
            self.generation,
            self._ids.at(positions),
            scores,
            numbers[rows],
            lists.rank[rows],
            _found(lists, rows, numbers) if question.found_by else None,
            self._titles.at(positions) if "title" in question.fields else None,
        )


def _found(lists: Lists, rows: Ints, numbers: Ints) -> Found:
    found, ends = provenance(lists, rows)
    return Found(numbers[found], lists.rank[found], lists.score[found], ends)

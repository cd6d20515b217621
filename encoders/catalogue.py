"""What the towers learn from, as plain arrays: a catalogue of items with their content, and the users' histories.

Legend: V items of the catalogue, U users, N events, dim_m width of a modality's content embedding.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from polytower.errors import UserError

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
Rows = TypeVar("Rows", FloatArray, IntArray)


@dataclass(frozen=True, eq=False)
class Catalogue:
    """All items that can be recommended, in a fixed order; an item's row number is its index everywhere.

    item_ids: V distinct ids. content[m]: float32 [V, dim_m], unit rows where present[m] (bool [V]) holds and anything
    (zeros by custom) where it does not. Both mappings name the same modalities; ValueError otherwise.
    """

    item_ids: list[str]
    content: Mapping[str, FloatArray] = field(default_factory=dict)
    present: Mapping[str, BoolArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.content) != set(self.present):
            raise ValueError(f"content names {sorted(self.content)}, present names {sorted(self.present)}")
        for name, rows in self.content.items():
            if rows.ndim != 2 or len(rows) != len(self.item_ids) or self.present[name].shape != (len(self.item_ids),):
                raise ValueError(f"modality {name}: {rows.shape} content rows for {len(self.item_ids)} items")

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def modalities(self) -> tuple[tuple[str, int], ...]:
        """(name, width) of each modality, by name: the order in which every tower sees them."""
        return tuple((name, self.content[name].shape[1]) for name in sorted(self.content))

    def reduced_to(self, modalities: Sequence[tuple[str, int]]) -> "Catalogue":
        """The catalogue with these modalities (name, width) alone; one that it has not is absent in every item.

        Raises UserError for one of another width.
        """
        content, present = {}, {}
        for name, width in modalities:
            rows = self.content.get(name, np.zeros((len(self), width), np.float32))
            if rows.shape[1] != width:
                raise UserError(
                    f"the model reads {name} of width {width}, the catalogue's has {rows.shape[1]}: encode it with the "
                    "encoder that the model was trained with"
                )
            content[name], present[name] = rows, self.present.get(name, np.zeros(len(self), np.bool_))
        return Catalogue(self.item_ids, content, present)

    def fingerprint(self) -> str:
        """Hex digest of the item ids in order: a checkpoint refuses a catalogue with another one."""
        return digest(self.item_ids)


@dataclass(frozen=True, eq=False)
class Histories:
    """The users' events in one flat array: user u's are items[offsets[u]:offsets[u + 1]], oldest first.

    offsets int64 [U + 1], items int64 [N] (catalogue indices), times int64 [N] (microseconds since 1970, UTC).
    attributes: float32 [U, A], what is known of the users, hashed; zero rows for nothing, None where nobody reads them.
    queries: int64 [N], what was searched for when the event happened, as a row of query_vectors (float32 [X, W], a row
    for each distinct text), -1 for nothing. asked: int64 [U], what each user searches for now, likewise; only in
    questions. None where nobody reads them.
    """

    user_ids: list[str]
    offsets: IntArray
    items: IntArray
    times: IntArray
    attributes: FloatArray | None = None
    queries: IntArray | None = None
    query_vectors: FloatArray | None = None
    asked: IntArray | None = None

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.user_ids) + 1 or len(self.items) != len(self.times):
            raise ValueError("histories: offsets and user_ids, or items and times, disagree in length")
        if self.attributes is not None and len(self.attributes) != len(self.user_ids):
            raise ValueError(f"histories: {len(self.attributes)} rows of attributes for {len(self.user_ids)} users")
        beside = [(self.queries, len(self.items)), (self.asked, len(self.user_ids))]
        if any(rows is not None and (self.query_vectors is None or len(rows) != size) for rows, size in beside):
            raise ValueError("histories: queries without vectors, or not one for each event (asked: for each user)")
        if len(self.offsets) and (self.offsets[0] != 0 or self.offsets[-1] != len(self.items)):
            raise ValueError("histories: offsets do not span the events")

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def lengths(self) -> IntArray:
        """Events per user, int64 [U]."""
        return np.diff(self.offsets)

    def of(self, user: int) -> IntArray:
        """Catalogue indices of one user's events, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def counts(self, items: int) -> IntArray:
        """Events per item of a catalogue of `items` items, int64 [V]."""
        return np.bincount(self.items, minlength=items).astype(np.int64)

    def keep(self, chosen: BoolArray) -> "Histories":
        """The same users with only the events where `chosen` (bool [N]) holds, order kept."""
        before = np.concatenate([[0], np.cumsum(chosen)]).astype(np.int64)
        queries = None if self.queries is None else self.queries[chosen]
        return replace(
            self, offsets=before[self.offsets], items=self.items[chosen], times=self.times[chosen], queries=queries
        )

    def select(self, users: IntArray) -> "Histories":
        """The histories of these users (indices), in this order."""
        lengths = self.lengths[users]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        rows = np.repeat(self.offsets[users] - offsets[:-1], lengths) + np.arange(offsets[-1])
        names = [self.user_ids[user] for user in users]
        return Histories(
            names, offsets, self.items[rows], self.times[rows], _taken(self.attributes, users),
            _taken(self.queries, rows), self.query_vectors, _taken(self.asked, users),
        )  # fmt: skip

    def active(self) -> "Histories":
        """The users who have an event; users who are known by their attributes alone are left out."""
        return self if self.lengths.all() else self.select(np.flatnonzero(self.lengths))

    def fingerprint(self, *reads: str) -> str:
        """Hex digest of users and events, and of the fields that a tower `reads`: a resumed run refuses other data."""
        beside = [getattr(self, name) for name in reads]
        return digest(self.user_ids, self.offsets, self.items, *(array for array in beside if array is not None))


def _taken(array: Rows | None, rows: IntArray) -> Rows | None:
    return None if array is None else array[rows]


def digest(*parts: Sequence[str] | NDArray[np.generic]) -> str:
    """SHA-256 (hex, 16 characters) over lists of strings and arrays."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part.tobytes() if isinstance(part, np.ndarray) else "\x1f".join(part).encode())
        state.update(b"\x1e")
    return state.hexdigest()[:16]

"""Training rows: users packed into full rows, each reading its own past only (a block-causal mask).

The median history of the Amazon sets has 6 events: padded to 50 tokens, nine tenths of the work would be padding.

Legend: R rows, T tokens of a row, B rows of a step, S drawn targets a position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from encoders.catalogue import Catalogue, FloatArray, Histories, IntArray
from encoders.config import TrainConfig
from encoders.towers.model import Context


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows, all int64 [R, T]: inputs and targets (catalogue indices; input -1: no event yet), segment
    (0 = padding), position, time, and the owner whose attributes are read. drawn: [R, T, S], targets from the windows
    ahead, None without windows. queries, asked: the query of the input and of the target, rows of query_vectors
    (float32 [X + 1, W], the last row, that of -1, is zero); None without queries.

    attributes: float32 [U + 1, A], by owner; the last row, that of owner -1, is zero. None: there are none.
    users[r]: the users (indices) packed into row r, for messages.
    """

    inputs: IntArray
    targets: IntArray
    drawn: IntArray | None
    segments: IntArray
    positions: IntArray
    times: IntArray
    owners: IntArray
    attributes: FloatArray | None
    users: list[list[int]]
    queries: IntArray | None = None
    asked: IntArray | None = None
    query_vectors: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one step as tensors: inputs, positions int64 [B, T]; events bool [B, T], False where the input is no
    item; allowed bool [B, T, T]; valid bool [B, T]; targets int64 [P], those of the valid tokens in row order; drawn
    int64 [P, S], theirs from the windows ahead.
    """

    inputs: Tensor
    events: Tensor
    positions: Tensor
    context: Context
    allowed: Tensor
    valid: Tensor
    targets: Tensor
    drawn: Tensor | None
    users: list[int]


def rows(catalogue: Catalogue, train: Histories, config: TrainConfig, rng: np.random.Generator) -> Rows:  # noqa: ARG001
    """One epoch's rows, as the configuration wants them (`pack`)."""
    shape = config.towers
    starts = bool({"attributes", "queries"} & {*shape.reads})  # else nothing is known of a user without events
    return pack(
        train, shape.history, rng, starts=starts, silent=shape.silent_users, silent_queries=shape.silent_queries,
        windows=config.windows, drawn=config.window_targets,
    )  # fmt: skip


def pack(
    histories: Histories,
    width: int,
    rng: np.random.Generator,
    *,
    starts: bool = False,
    silent: float = 0.0,
    silent_queries: float = 0.0,
    windows: Sequence[int] = (),
    drawn: int = 1,
) -> Rows:
    """One epoch's rows: every event but a window's first is a target once.

    windows: beside the next event, `drawn` more targets a position, each one of the next w events of the user's history
    for a w of these (with equal chances, and repeats). starts: a user's first event is a target too, that of an empty
    history, in a window of its own. silent: share of the windows that do without their user's attributes,
    silent_queries: of the positions that do without the query of their target, both drawn from rng.

    Histories longer than `width` + 1 events are cut into windows at a random offset, so that every event is seen with
    ever other context. Best fit, longest first; the order of users and rows is drawn from rng.
    """
    first, lengths, owners = cut(histories, width, rng)
    if starts:
        begun = np.flatnonzero(histories.lengths > 0)
        first, owners = np.concatenate([first, histories.offsets[begun] - 1]), np.concatenate([owners, begun])
        lengths = np.concatenate([lengths, np.ones_like(begun)])
    order = np.lexsort((rng.random(len(lengths)), -lengths))
    rows, counts, offsets = _best_fit(lengths[order], width)
    first, lengths, owners = first[order], lengths[order], owners[order]
    total = rows.max() + 1 if len(rows) else 0
    shuffled = rng.permutation(total)
    rows = shuffled[rows]

    inputs, targets, segments, positions, times, read = (np.zeros((total, width), dtype=np.int64) for _ in range(6))
    step = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = (np.repeat(rows, lengths), np.repeat(offsets, lengths) + step)
    source = np.repeat(first, lengths) + step
    targets[place] = histories.items[source + 1]
    inputs[place] = np.where(source < histories.offsets[np.repeat(owners, lengths)], -1, histories.items[source])
    later = None
    if windows:
        later = np.zeros((total, width, drawn), dtype=np.int64)
        ahead = histories.offsets[np.repeat(owners, lengths) + 1] - 1 - source  # events after the input
        reach = np.minimum(rng.choice(np.array(windows), (len(source), drawn)), ahead[:, None])
        later[place] = histories.items[source[:, None] + 1 + (rng.random(reach.shape) * reach).astype(np.int64)]
    segments[place], positions[place], times[place] = np.repeat(counts, lengths) + 1, step, histories.times[source]
    attributes = None
    if histories.attributes is not None:
        attributes = np.concatenate([histories.attributes, np.zeros_like(histories.attributes[:1])])
        read[place] = np.repeat(np.where(rng.random(len(owners)) < silent, -1, owners), lengths)
    users: list[list[int]] = [[] for _ in range(total)]
    for row, owner in zip(rows.tolist(), owners.tolist(), strict=True):
        users[row].append(owner)
    packed = Rows(inputs, targets, later, segments, positions, times, read, attributes, users)
    if histories.queries is None or histories.query_vectors is None:
        return packed
    queries, asked = (np.full((total, width), -1, dtype=np.int64) for _ in range(2))
    queries[place] = np.where(inputs[place] < 0, -1, histories.queries[source])
    asked[place] = np.where(rng.random(len(source)) < silent_queries, -1, histories.queries[source + 1])
    vectors = np.concatenate(
        [histories.query_vectors, np.zeros_like(histories.query_vectors, shape=(1, histories.query_vectors.shape[1]))]
    )
    return replace(packed, queries=queries, asked=asked, query_vectors=vectors)


def batches(rows: Rows, size: int, device: torch.device, *, share: int = 0, shares: int = 1) -> Iterator[Batch]:
    """The rows in order, `size` at a time; of these, the rows share, share + shares, … (none, where too few)."""
    for start in range(0, len(rows), size):
        part = slice(start + share, start + size, shares)
        segments = torch.from_numpy(rows.segments[part]).to(device)
        valid = segments > 0
        steps = segments.shape[1]
        causal = torch.ones(steps, steps, dtype=torch.bool, device=device).tril()
        yield Batch(
            inputs=torch.from_numpy(rows.inputs[part].clip(min=0)).to(device),
            events=torch.from_numpy(rows.inputs[part] >= 0).to(device),
            positions=torch.from_numpy(rows.positions[part]).to(device),
            context=_context(rows, part).to(device),
            allowed=causal & (segments[:, :, None] == segments[:, None, :]),
            valid=valid,
            targets=torch.from_numpy(rows.targets[part]).to(device)[valid],
            drawn=None if rows.drawn is None else torch.from_numpy(rows.drawn[part]).to(device)[valid],
            users=sorted({user for row in rows.users[part] for user in row}),
        )


def _context(rows: Rows, part: slice) -> Context:
    attributes = None if rows.attributes is None else torch.from_numpy(rows.attributes[rows.owners[part]])
    queries = asked = None
    if rows.query_vectors is not None and rows.queries is not None and rows.asked is not None:
        queries, asked = (torch.from_numpy(rows.query_vectors[which[part]]) for which in (rows.queries, rows.asked))
    return Context(torch.from_numpy(rows.times[part]), attributes, queries, asked)


def cut(histories: Histories, width: int, rng: np.random.Generator) -> tuple[IntArray, IntArray, IntArray]:
    """(first event, training positions, user) of each window; a window of n positions spans n + 1 events."""
    lengths = histories.lengths - 1  # positions: the last event is a target only
    short = np.flatnonzero((lengths > 0) & (lengths <= width))
    starts, sizes, owners = [histories.offsets[short]], [lengths[short]], [short]
    for user in np.flatnonzero(lengths > width).tolist():
        cuts = np.arange(int(rng.integers(1, width + 1)), lengths[user], width)
        edges = np.concatenate([[0], cuts, [lengths[user]]]).astype(np.int64)
        starts.append(histories.offsets[user] + edges[:-1])
        sizes.append(np.diff(edges))
        owners.append(np.full(len(edges) - 1, user, dtype=np.int64))
    return np.concatenate(starts), np.concatenate(sizes), np.concatenate(owners)


def _best_fit(lengths: IntArray, width: int) -> tuple[IntArray, IntArray, IntArray]:
    """(row, windows before it in the row, tokens before it in the row) of each window: the fullest row that has room.

    Rows are kept by their free tokens; a bit per non-empty class makes the search constant time.
    """
    free: list[list[tuple[int, int]]] = [[] for _ in range(width + 1)]
    classes, total = 0, 0
    rows, counts, offsets = (np.zeros(len(lengths), dtype=np.int64) for _ in range(3))
    for index, length in enumerate(lengths.tolist()):
        fitting = classes >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row, count = free[room].pop()
            classes &= ~(1 << room) if not free[room] else -1
        else:
            row, count, room, total = total, 0, width, total + 1
        rows[index], counts[index], offsets[index] = row, count, width - room
        left = room - length
        free[left].append((row, count + 1))
        classes |= 1 << left
    return rows, counts, offsets

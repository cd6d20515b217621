"""Training rows: users packed into full rows, each reading its own past only (a block-causal mask).

The median history of the Amazon sets has 6 events: padded to 50 tokens, nine tenths of the work would be padding.

Legend: R rows, T tokens of a row, B rows of a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from encoders.catalogue import Histories, IntArray


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows, all int64 [R, T]: inputs and targets (catalogue indices), segment (0 = padding), position, time.

    users[r]: the users (indices) packed into row r, for messages.
    """

    inputs: IntArray
    targets: IntArray
    segments: IntArray
    positions: IntArray
    times: IntArray
    users: list[list[int]]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one step as tensors: inputs, positions, times (microseconds) int64 [B, T]; allowed bool [B, T, T];
    valid bool [B, T]; targets int64 [P], those of the valid tokens in row order.
    """

    inputs: Tensor
    positions: Tensor
    times: Tensor
    allowed: Tensor
    valid: Tensor
    targets: Tensor
    users: list[int]


def pack(histories: Histories, width: int, rng: np.random.Generator) -> Rows:
    """One epoch's rows: every event but a window's first is a target once.

    Histories longer than `width` + 1 events are cut into windows at a random offset, so that every event is seen with
    ever other context. Best fit, longest first; the order of users and rows is drawn from rng.
    """
    starts, lengths, owners = _windows(histories, width, rng)
    order = np.lexsort((rng.random(len(lengths)), -lengths))
    rows, counts, offsets = _best_fit(lengths[order], width)
    starts, lengths, owners = starts[order], lengths[order], owners[order]
    total = rows.max() + 1 if len(rows) else 0
    shuffled = rng.permutation(total)
    rows = shuffled[rows]

    inputs, targets, segments, positions, times = (np.zeros((total, width), dtype=np.int64) for _ in range(5))
    step = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = (np.repeat(rows, lengths), np.repeat(offsets, lengths) + step)
    source = np.repeat(starts, lengths) + step
    inputs[place], targets[place] = histories.items[source], histories.items[source + 1]
    segments[place], positions[place], times[place] = np.repeat(counts, lengths) + 1, step, histories.times[source]
    users: list[list[int]] = [[] for _ in range(total)]
    for row, owner in zip(rows.tolist(), owners.tolist(), strict=True):
        users[row].append(owner)
    return Rows(inputs, targets, segments, positions, times, users)


def batches(rows: Rows, size: int, device: torch.device, *, share: int = 0, shares: int = 1) -> Iterator[Batch]:
    """The rows in order, `size` at a time; of these, the rows share, share + shares, … (none, where too few)."""
    for start in range(0, len(rows), size):
        part = slice(start + share, start + size, shares)
        segments = torch.from_numpy(rows.segments[part]).to(device)
        valid = segments > 0
        steps = segments.shape[1]
        causal = torch.ones(steps, steps, dtype=torch.bool, device=device).tril()
        yield Batch(
            inputs=torch.from_numpy(rows.inputs[part]).to(device),
            positions=torch.from_numpy(rows.positions[part]).to(device),
            times=torch.from_numpy(rows.times[part]).to(device),
            allowed=causal & (segments[:, :, None] == segments[:, None, :]),
            valid=valid,
            targets=torch.from_numpy(rows.targets[part]).to(device)[valid],
            users=sorted({user for row in rows.users[part] for user in row}),
        )


def _windows(histories: Histories, width: int, rng: np.random.Generator) -> tuple[IntArray, IntArray, IntArray]:
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

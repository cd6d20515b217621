"""Columns of text arrays as Postgres sends them, decoded for all rows at once: the driver would make a string of each.

`array_send(text[])` is a header, then per element its length (big-endian int32) and its bytes. Text holds no zero byte,
and the length of an element of 1 to 255 bytes begins with three: where the zeros are tells where the elements begin.
Columns with other elements (empty, longer, null) are walked through, element by element.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from struct import Struct
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

# array_send: dimensions, has nulls, type of the elements, number of them, first index; the first three if it is empty.
HEADER = 20
_COUNT = slice(12, 16)
_LENGTH = Struct(">i")


@dataclass(frozen=True)
class _Elements:
    """All E elements of N arrays. wire: their lengths and bytes. starts, lengths: [E]. ends: N + 1, in elements."""

    wire: NDArray[np.uint8]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    ends: list[int]


def as_lists(column: Sequence[bytes | None]) -> list[list[str | None] | None]:
    """N arrays (None where absent) as lists of strings."""
    found = _elements(column)
    if found is None:
        return [None if raw is None else list(_walk(raw[HEADER:])) for raw in column]
    # One zero stays of each length, to split at.
    texts: list[str | None] = [*_without(found, [1, 2, 3]).tobytes().decode().split("\0")[1:]]
    places = pairwise(found.ends)
    return [None if raw is None else texts[start:end] for raw, (start, end) in zip(column, places, strict=True)]


def as_arrow(column: Sequence[bytes | None]) -> "pa.Array":
    """The same as Arrow's list<string>."""
    import pyarrow as pa

    found = _elements(column)
    if found is None:
        return pa.array(as_lists(column), pa.list_(pa.string()))
    offsets = np.zeros(len(found.lengths) + 1, np.int32)
    np.cumsum(found.lengths, out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(_without(found, [0, 1, 2, 3]))]
    texts = pa.StringArray.from_buffers(len(found.lengths), *buffers[1:])
    return pa.ListArray.from_arrays(pa.array(found.ends, pa.int32()), texts, mask=absent(column))


def absent(column: Sequence[bytes | None]) -> "pa.Array | None":
    """Which rows have no value; None if all have one."""
    import pyarrow as pa

    missing = [raw is None for raw in column]
    return pa.array(missing, pa.bool_()) if True in missing else None


def _elements(column: Sequence[bytes | None]) -> _Elements | None:
    """None where the zeros do not tell."""
    wire = np.frombuffer(b"".join(b"" if raw is None else raw[HEADER:] for raw in column), np.uint8)
    counts = (0 if raw is None else int.from_bytes(raw[_COUNT]) for raw in column)
    ends = list(accumulate(counts, initial=0))
    zeros = np.flatnonzero(wire == 0)
    if len(zeros) != 3 * ends[-1]:
        return None
    starts = zeros[::3]
    lengths = wire.take(starts + 3, mode="clip").astype(np.int64)
    # Each element must end where the next one begins, and the last one with the wire: then no zero was anything else.
    if not np.array_equal(np.append(starts, len(wire)), np.append(0, starts + 4 + lengths)):
        return None
    return _Elements(wire, starts, lengths, ends)


def _without(found: _Elements, prefix: Sequence[int]) -> NDArray[np.uint8]:
    """The wire without these bytes of each element's length."""
    kept = np.ones(len(found.wire), bool)
    for byte in prefix:
        kept[found.starts + byte] = False
    return found.wire[kept]


def _walk(wire: bytes) -> Iterator[str | None]:
    place = 0
    while place < len(wire):
        (length,) = _LENGTH.unpack_from(wire, place)
        place += _LENGTH.size
        yield None if length < 0 else wire[place : place + length].decode()
        place += max(length, 0)

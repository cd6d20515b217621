"""Columns of text arrays as Postgres sends them; for Arrow decoded for all rows at once, without a string of each.

`array_send(text[])` is a header, then per element its length (big-endian int32) and its bytes. Text holds no zero byte,
and the length of an element of 1 to 255 bytes begins with three: where the zeros are tells where the elements begin.
Columns with other elements (empty, longer, null) are left to the driver.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from psycopg import adapters
from psycopg.adapt import Transformer
from psycopg.pq import Format

if TYPE_CHECKING:
    import pyarrow as pa

# array_send: dimensions, has nulls, type of the elements, number of them, first index; the first three if it is empty.
HEADER = 20
_COUNT = slice(12, 16)


class _Elements(NamedTuple):
    """All E elements of N arrays. content: their bytes. lengths: [E]. ends: N + 1, in elements."""

    content: NDArray[np.uint8]
    lengths: NDArray[np.uint8]
    ends: list[int]


def as_lists(column: Sequence[bytes | None]) -> list[list[str | None] | None]:
    """N arrays (None where absent) as lists of strings."""
    load = Transformer().get_loader(adapters.types["text"].array_oid, Format.BINARY).load
    return [None if raw is None else load(raw) for raw in column]


def as_arrow(column: Sequence[bytes | None]) -> "pa.Array":
    """The same as Arrow's list<string>."""
    import pyarrow as pa

    found = _elements(column)
    if found is None:
        return pa.array(as_lists(column), pa.list_(pa.string()))
    offsets = np.zeros(len(found.lengths) + 1, np.int32)
    np.cumsum(found.lengths, out=offsets[1:])
    texts = pa.StringArray.from_buffers(len(found.lengths), pa.py_buffer(offsets), pa.py_buffer(found.content))
    return pa.ListArray.from_arrays(pa.array(found.ends, pa.int32()), texts, mask=absent(column))


def absent(column: Sequence[bytes | None]) -> "pa.Array | None":
    """Which rows have no value; None if all have one."""
    import pyarrow as pa

    missing = [raw is None for raw in column]
    return pa.array(missing, pa.bool_()) if True in missing else None


def _elements(column: Sequence[bytes | None]) -> _Elements | None:
    """None where the zeros do not tell."""
    wire = np.frombuffer(b"".join(b"" if raw is None else raw[HEADER:] for raw in column), np.uint8)
    ends = list(accumulate((0 if raw is None else int.from_bytes(raw[_COUNT]) for raw in column), initial=0))
    filled = wire != 0
    zeros = np.flatnonzero(~filled)
    if len(zeros) != 3 * ends[-1]:
        return None
    marks = zeros[::3] + 3  # the fourth bytes of the lengths
    lengths = wire.take(marks, mode="clip")
    # Each element must end where the next one begins, and the last one with the wire: then no zero was anything else.
    if not np.array_equal(np.append(marks - 3, len(wire)), np.append(0, marks + 1 + lengths)):
        return None
    filled[marks] = False
    return _Elements(wire[filled], lengths, ends)

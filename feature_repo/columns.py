"""Columns of features: what Postgres sends, as Python values or as Arrow; without Feast, for the HTTP server.

Conversion goes column by column: one numpy call decodes the vectors of all entities, where a call per cell would cost
more than the query. Shape legend: N entities, L numbers or strings in one entity's list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from feature_repo import text_arrays

if TYPE_CHECKING:
    import pyarrow as pa

# What a feature's column looks like on the wire: as the driver reads it, or packed bytes that numpy reads.
# "moment" and "moments" are microseconds since 1970 for Feast and timestamptz in the tables, "json" text and jsonb.
Kind = Literal["text", "json", "integer", "moment", "number", "flag", "texts", "reals", "halves", "moments"]

# Postgres counts microseconds from 2000-01-01, Feast's users from 1970-01-01.
# What stands before and after the rows of COPY … (FORMAT binary)
COPY_START = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
COPY_END = b"\xff\xff"
POSTGRES_EPOCH_MICROS = 946_684_800_000_000
# halfvec_send: int16 dimension, int16 unused, then big-endian half floats.
_HALFVEC_HEADER = 4
MOMENT = np.dtype([("length", ">i4"), ("micros", ">i8")])


def as_python(kind: Kind, column: Sequence[Any]) -> list[Any]:
    """N raw values (None where absent) as Python values: str, int, float, bool or lists of them.

    "halves" are packed with `halfvec_send` (or several of their bodies one after the other behind one header),
    "texts" and "moments" with `array_send`; the latter become microseconds since 1970.
    """
    if kind == "texts":
        return text_arrays.as_lists(column)
    if kind not in _PACKED:
        return list(column)
    numbers, ends = _decoded(_PACKED[kind], column)
    flat = numbers.tolist()
    lists = [flat[start:end] for start, end in pairwise(ends)]
    return [None if raw is None else values for raw, values in zip(column, lists, strict=True)]


def as_arrow(kind: Kind, column: Sequence[Any]) -> "pa.Array":
    """The same as an Arrow array. Its type depends on the kind alone: an embedding is list<float>, also when absent."""
    import pyarrow as pa

    if kind == "texts":
        return text_arrays.as_arrow(column)
    if kind not in _PACKED:
        return pa.array(column, _arrow_type(kind))
    numbers, ends = _decoded(_PACKED[kind], column)
    mask = text_arrays.absent(column)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(numbers), mask=mask)


def _arrow_type(kind: Kind) -> "pa.DataType":
    import pyarrow as pa

    types = {
        "integer": pa.int64(),
        "moment": pa.int64(),
        "number": pa.float64(),
        "flag": pa.bool_(),
        "reals": pa.list_(pa.float32()),
    }
    return types.get(kind, pa.string())


@dataclass(frozen=True)
class _Packed:
    """Lists of numbers as bytes: what precedes the elements, one element, and how all of them become numbers."""

    header: int
    element: np.dtype[Any]
    decode: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


_PACKED: dict[Kind, _Packed] = {
    "halves": _Packed(_HALFVEC_HEADER, np.dtype(">f2"), lambda flat: flat.astype(np.float32)),
    "moments": _Packed(text_arrays.HEADER, MOMENT, lambda flat: flat["micros"] + POSTGRES_EPOCH_MICROS),
}


def _decoded(packed: _Packed, column: Sequence[bytes | None]) -> tuple[np.ndarray[Any, Any], list[int]]:
    """All numbers of N rows at once, and the N + 1 places where the rows' lists meet."""
    bodies = [b"" if raw is None else raw[packed.header :] for raw in column]
    numbers = packed.decode(np.frombuffer(b"".join(bodies), dtype=packed.element))
    return numbers, list(accumulate((len(body) // packed.element.itemsize for body in bodies), initial=0))

"""Columns of features: from what Postgres sends, to Python values, to Feast's protobuf values.

Conversion goes column by column: one numpy call decodes the vectors of all entities, where a call per cell would cost
more than the query. Shape legend: N entities, L numbers or strings in one entity's list.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
from feast.protos.feast.types.Value_pb2 import FloatList, Int64List, StringList
from feast.protos.feast.types.Value_pb2 import Value as ValueProto

# What a feature's column looks like on the wire: as the driver reads it, or packed bytes that numpy reads.
# "moment" and "moments" are microseconds since 1970 for Feast and timestamptz in the tables, "json" text and jsonb.
Kind = Literal["text", "json", "integer", "moment", "number", "flag", "texts", "reals", "halves", "moments"]

# Postgres counts microseconds from 2000-01-01, Feast's users from 1970-01-01.
POSTGRES_EPOCH_MICROS = 946_684_800_000_000
# halfvec_send: int16 dimension, int16 unused, then big-endian half floats.
_HALFVEC_HEADER = 4
# array_send of one dimension without nulls: five int32, then per element an int32 length and the element.
_ARRAY_HEADER = 20
MOMENT = np.dtype([("length", ">i4"), ("micros", ">i8")])


def as_python(kind: Kind, column: Sequence[Any]) -> list[Any]:
    """N raw values (None where absent) as Python values: str, int, float, bool or lists of them.

    "halves" are packed with `halfvec_send` (or several of their bodies one after the other behind one header),
    "moments" with `array_send(timestamptz[])`; the latter become microseconds since 1970.
    """
    if kind == "halves":
        return _split(column, _HALFVEC_HEADER, np.dtype(">f2"), lambda flat: flat.astype(np.float32))
    if kind == "moments":
        return _split(column, _ARRAY_HEADER, MOMENT, lambda flat: flat["micros"] + POSTGRES_EPOCH_MICROS)
    return list(column)


def _split(
    column: Sequence[bytes | None],
    header: int,
    element: np.dtype[Any],
    decode: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
) -> list[Any]:
    """Decodes all rows at once, then cuts the flat list at the rows' ends."""
    bodies = [b"" if raw is None else raw[header:] for raw in column]
    flat = decode(np.frombuffer(b"".join(bodies), dtype=element)).tolist()
    ends = accumulate((len(body) // element.itemsize for body in bodies), initial=0)
    lists = [flat[start:end] for start, end in pairwise(ends)]
    return [None if raw is None else values for raw, values in zip(column, lists, strict=True)]


_PROTO: dict[Kind, Callable[[Any], ValueProto]] = {
    "text": lambda value: ValueProto(string_val=value),
    "json": lambda value: ValueProto(string_val=value),
    "integer": lambda value: ValueProto(int64_val=value),
    "moment": lambda value: ValueProto(int64_val=value),
    "number": lambda value: ValueProto(double_val=value),
    "flag": lambda value: ValueProto(bool_val=value),
    "texts": lambda value: ValueProto(string_list_val=StringList(val=value)),
    "reals": lambda value: ValueProto(float_list_val=FloatList(val=value)),
    "halves": lambda value: ValueProto(float_list_val=FloatList(val=value)),
    "moments": lambda value: ValueProto(int64_list_val=Int64List(val=value)),
}


def as_proto(kind: Kind, values: Sequence[Any]) -> list[ValueProto]:
    """N Python values as Feast's values; None becomes the empty value."""
    convert, absent = _PROTO[kind], ValueProto()
    return [absent if value is None else convert(value) for value in values]

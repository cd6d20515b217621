"""Feature rows as a binary COPY stream, encoded by column.

The driver's own encoder takes lists element by element through its type adapters, ten times slower than the rest of a
write. Here all elements of a column go through numpy at once; lists of strings are not even decoded: their protobuf
wire format (tag, length, bytes) differs from Postgres' arrays (length, bytes) by two bytes per element.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate, chain, pairwise, repeat
from struct import Struct
from typing import Any

import numpy as np
from feast.protos.feast.types.Value_pb2 import Value as ValueProto

from feature_repo.columns import MOMENT, POSTGRES_EPOCH_MICROS, Kind
from polytower.errors import UserError

_NULL = b"\xff\xff\xff\xff"
_INT16, _INT32, _INT64, _DOUBLE = Struct(">h"), Struct(">i"), Struct(">iq"), Struct(">id")
_DATE = Struct(">ii")
# Of an array: bytes of the cell, dimensions (1), has nulls (0), type of the elements, number of them, first index (1)
_ARRAY, _EMPTY_ARRAY = Struct(">iiiIii"), Struct(">iiiI")
_TEXT, _REAL, _TIMESTAMPTZ = 25, 700, 1184
_REAL_ELEMENT = np.dtype([("length", ">i4"), ("value", ">f4")])
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# The tag that protobuf writes before each string of a StringList (field 1, length-delimited); also "\n"
_TAG = 10
# Of the bytes of a varint, the highest bit says that more follow; the other seven are pushed together pairwise.
_MARKS = np.uint64(0x8080808080808080)
_COMPACTION = [
    (np.uint64(low), np.uint64(gap))
    for low, gap in ((0x007F007F007F007F, 1), (0x00003FFF00003FFF, 2), (0x000000000FFFFFFF, 4))
]

# Kind → the field of Feast's value, the Postgres type of its column in the stream
FIELDS: dict[Kind, tuple[str, str]] = {
    "text": ("string_val", "text"),
    "json": ("string_val", "jsonb"),
    "integer": ("int64_val", "bigint"),
    "moment": ("int64_val", "timestamptz"),
    "number": ("double_val", "double precision"),
    "flag": ("bool_val", "boolean"),
    "texts": ("string_list_val", "text[]"),
    "reals": ("float_list_val", "real[]"),
    "halves": ("float_list_val", "real[]"),
    "moments": ("int64_list_val", "timestamptz[]"),
}


def present(feature: str, kind: Kind, values: Sequence[ValueProto]) -> list[Any]:
    """The content of N values of one feature, None where absent; lists stay protobuf's messages.

    NaN counts as absent: Feast's dataframes put it there. Raises UserError for a value of another type.
    """
    field, _ = FIELDS[kind]
    fields = [value.WhichOneof("val") for value in values]
    if len(wrong := set(fields) - {field, None}) > 0:
        raise UserError(f"feature {feature!r} takes {field}, and a row brings {min(map(str, wrong))}")
    content = [None if given is None else getattr(value, field) for given, value in zip(fields, values, strict=True)]
    return [None if number != number else number for number in content] if kind == "number" else content


def text_cells(texts: Sequence[str | None]) -> list[bytes]:
    """N strings as cells."""
    encoded = [None if text is None else text.encode() for text in texts]
    return [_NULL if text is None else _INT32.pack(len(text)) + text for text in encoded]


def moment_cells(moments: Sequence[datetime]) -> list[bytes]:
    """N aware timestamps as cells."""
    return [_INT64.pack(8, (moment - _EPOCH) // _MICROSECOND) for moment in moments]


def day_cells(moments: Sequence[datetime]) -> list[bytes]:
    """The days (UTC) of N aware timestamps as cells of type date."""
    return [_DATE.pack(4, (moment - _EPOCH).days) for moment in moments]


def value_cells(kind: Kind, content: Sequence[Any]) -> list[bytes]:
    """N present values of one feature as cells."""
    if kind == "text":
        return text_cells(content)
    if kind == "json":
        # The version of jsonb's binary format, then text
        return text_cells([None if each is None else "\x01" + each for each in content])
    if kind == "texts":
        return _text_arrays(content)
    if kind in ("reals", "halves"):
        return _number_arrays(_REAL, _REAL_ELEMENT, 0, content)
    if kind == "moments":
        return _number_arrays(_TIMESTAMPTZ, MOMENT, POSTGRES_EPOCH_MICROS, content)
    if kind == "flag":
        return [_NULL if each is None else _INT32.pack(1) + bytes([each]) for each in content]
    scalar, origin = _DOUBLE if kind == "number" else _INT64, POSTGRES_EPOCH_MICROS if kind == "moment" else 0
    return [_NULL if each is None else scalar.pack(8, each - origin) for each in content]


def copy_rows(columns: Sequence[Sequence[bytes]]) -> bytes:
    """Columns of N cells each as rows of COPY … (FORMAT binary), to stand between COPY_START and COPY_END."""
    width = _INT16.pack(len(columns))
    return b"".join(chain.from_iterable(zip(repeat(width, len(columns[0])), *columns, strict=True)))


def _text_arrays(content: Sequence[Any]) -> list[bytes]:
    """N lists of strings (StringList, None) as cells of type text[]."""
    lengths = [0 if each is None else len(each.val) for each in content]
    wires = [b"" if each is None else each.SerializeToString() for each in content]
    wire = b"".join(wires)
    if _widens(wire):
        # 255 occurs in no UTF-8 text and is no length below 128: it keeps the lengths that look like tags apart.
        body = wire.replace(b"\n\n", b"\xff").replace(b"\n", bytes(3)).replace(b"\xff", b"\0\0\0\n")
        ends = list(accumulate(len(each) + 2 * length for each, length in zip(wires, lengths, strict=True)))
    else:
        bodies = [b"" if each is None else _elements(each.val) for each in content]
        body, ends = b"".join(bodies), list(accumulate(map(len, bodies)))
    return _cut(_TEXT, body, ends, lengths, content)


def _widens(wire: bytes) -> bool:
    """Whether strings in wire format become array elements by writing each tag as three zero bytes.

    They do not where a string holds a newline (which looks like a tag) or is longer than 127 bytes.
    """
    flat = np.frombuffer(wire, np.uint8)
    tags = flat == _TAG
    # A string of ten bytes has the length "\n": of two in a row, the first is the tag.
    tags[1:] &= flat[:-1] != _TAG
    starts = np.flatnonzero(tags)
    if len(starts) == 0 or starts[-1] + 1 == len(flat):
        return len(flat) == 0
    lengths = flat[starts + 1]
    ends = starts + lengths + 2
    # By induction from the first byte, which is a tag: if each element ends where the next one was seen, all are true.
    return bool(lengths.max() < 128 and ends[-1] == len(flat) and (ends[:-1] == starts[1:]).all())


def _elements(texts: Sequence[str]) -> bytes:
    """The same for any strings, one by one."""
    return b"".join([_INT32.pack(len(text)) + text for text in map(str.encode, texts)])


def _number_arrays(element: int, layout: np.dtype[Any], origin: int, content: Sequence[Any]) -> list[bytes]:
    """N lists of numbers (messages, None) as array cells: all elements in one numpy array, cut at the lists' ends."""
    lengths = [0 if each is None else len(each.val) for each in content]
    number = layout.names[1]  # type: ignore[index]
    flat = _eight_byte_integers(content, lengths) if number == "micros" else None
    if flat is None:
        elements = chain.from_iterable(each.val for each in content if each is not None)
        flat = np.fromiter(elements, layout[number].newbyteorder("="), count=sum(lengths))
    packed = np.empty(len(flat), dtype=layout)
    packed["length"], packed[number] = layout[number].itemsize, flat - origin
    ends = [layout.itemsize * end for end in accumulate(lengths)]
    return _cut(element, packed.tobytes(), ends, lengths, content)


def _eight_byte_integers(content: Sequence[Any], lengths: Sequence[int]) -> np.ndarray[Any, Any] | None:
    """All integers of N lists (Int64List, None) from their wire format; None unless each is a varint of eight bytes.

    Microseconds since 1970 are, from 1987 to 4253: seven bits in each of eight bytes, all but the last one marked.
    """
    bodies = []
    for each, size in zip(content, (8 * length for length in lengths), strict=True):
        if size:
            wire = each.SerializeToString()
            bodies.append(wire[-size:])
            # A tag and the payload's size, itself a varint
            if len(wire) != 1 + (size.bit_length() + 6) // 7 + size:
                return None
    groups = np.frombuffer(b"".join(bodies), "<u8")
    if (groups & _MARKS != _MARKS >> np.uint64(8)).any():
        return None
    groups = groups & ~_MARKS
    for low, gap in _COMPACTION:
        groups = (groups & low) | ((groups & ~low) >> gap)
    return groups.astype(np.int64)


def _cut(element: int, body: bytes, ends: Sequence[int], lengths: Sequence[int], content: Sequence[Any]) -> list[bytes]:
    """Array cells from all their elements, which are cut at the lists' ends (in bytes)."""
    cells = []
    for each, length, (start, end) in zip(content, lengths, pairwise([0, *ends]), strict=True):
        if length:
            cells.append(_ARRAY.pack(20 + end - start, 1, 0, element, length, 1) + body[start:end])
        else:
            cells.append(_NULL if each is None else _EMPTY_ARRAY.pack(12, 0, 0, element))
    return cells

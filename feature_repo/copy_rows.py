"""Feature rows as a binary COPY stream, encoded by column.

The driver's own encoder takes lists element by element through its type adapters, ten times slower than the rest of a
write. Here all numbers of a column go through numpy at once, and a list of strings travels as one text, each element
behind a separator that none of them holds; Postgres splits it (`(string_to_array(list, separator))[2:]`).
"""

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate, chain, pairwise
from struct import Struct
from typing import Any

import numpy as np
from feast.protos.feast.types.Value_pb2 import Value as ValueProto

from feature_repo.columns import MOMENT, POSTGRES_EPOCH_MICROS, Kind
from polytower.errors import UserError

COPY_START = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
COPY_END = b"\xff\xff"
_NULL = b"\xff\xff\xff\xff"
_INT16, _INT32, _INT64, _DOUBLE = Struct(">h"), Struct(">i"), Struct(">iq"), Struct(">id")
# Of an array: bytes of the cell, dimensions (1), has nulls (0), type of the elements, number of them, first index (1)
_ARRAY, _EMPTY_ARRAY = Struct(">iiiIii"), Struct(">iiiI")
_REAL, _TIMESTAMPTZ = 700, 1184
_REAL_ELEMENT = np.dtype([("length", ">i4"), ("value", ">f4")])
_SEPARATORS = ("\x1f", "\x1e", "\x1d")
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

# Kind → the field of Feast's value, the Postgres type of its column in the stream
FIELDS: dict[Kind, tuple[str, str]] = {
    "text": ("string_val", "text"),
    "integer": ("int64_val", "bigint"),
    "number": ("double_val", "double precision"),
    "flag": ("bool_val", "boolean"),
    "texts": ("string_list_val", "text"),
    "reals": ("float_list_val", "real[]"),
    "halves": ("float_list_val", "real[]"),
    "moments": ("int64_list_val", "timestamptz[]"),
}


def present(feature: str, kind: Kind, values: Sequence[ValueProto]) -> list[Any]:
    """The content of N values of one feature, None where absent; lists stay protobuf's.

    NaN counts as absent: Feast's dataframes put it there. Raises UserError for a value of another type.
    """
    field, _ = FIELDS[kind]
    fields = [value.WhichOneof("val") for value in values]
    other = next((given for given in fields if given not in (field, None)), None)
    if other is not None:
        raise UserError(f"feature {feature!r} takes {field}, and a row brings {other}")
    content = [None if given is None else getattr(value, field) for given, value in zip(fields, values, strict=True)]
    if kind == "number":
        return [None if number != number else number for number in content]
    return content if not field.endswith("_list_val") else [None if inner is None else inner.val for inner in content]


def joined(columns: Mapping[str, Sequence[Any]]) -> tuple[str, dict[str, list[str | None]]]:
    """Columns of lists of strings as columns of texts, each element behind the separator that is answered first.

    The separator occurs in no element: a control character, or else a random token.
    """
    for separator in (*_SEPARATORS, secrets.token_hex(16)):
        texts = {name: [_join(each, separator) for each in lists] for name, lists in columns.items()}
        pairs = ((text, each) for name in columns for text, each in zip(texts[name], columns[name], strict=True))
        if all(text is None or text.count(separator) == len(each) for text, each in pairs):
            break
    return separator, texts


def text_cells(texts: Sequence[str | None]) -> list[bytes]:
    """N strings as cells."""
    encoded = [None if text is None else text.encode() for text in texts]
    return [_NULL if text is None else _INT32.pack(len(text)) + text for text in encoded]


def moment_cells(moments: Sequence[datetime]) -> list[bytes]:
    """N aware timestamps as cells."""
    return [_INT64.pack(8, (moment - _EPOCH) // _MICROSECOND) for moment in moments]


def value_cells(kind: Kind, content: Sequence[Any]) -> list[bytes]:
    """N present values of one feature as cells; lists of strings come joined."""
    if kind in ("text", "texts"):
        return text_cells(content)
    if kind in ("reals", "halves"):
        return _arrays(_REAL, _REAL_ELEMENT, 0, content)
    if kind == "moments":
        return _arrays(_TIMESTAMPTZ, MOMENT, POSTGRES_EPOCH_MICROS, content)
    if kind == "flag":
        return [_NULL if each is None else _INT32.pack(1) + bytes([each]) for each in content]
    scalar, size = (_INT64, 8) if kind == "integer" else (_DOUBLE, 8)
    return [_NULL if each is None else scalar.pack(size, each) for each in content]


def copy_rows(columns: Sequence[Sequence[bytes]]) -> bytes:
    """Columns of N cells each as rows of COPY … (FORMAT binary), to stand between COPY_START and COPY_END."""
    width = _INT16.pack(len(columns))
    return b"".join(width + b"".join(row) for row in zip(*columns, strict=True))


def _join(elements: Sequence[str] | None, separator: str) -> str | None:
    if elements is None:
        return None
    return separator + separator.join(elements) if elements else ""


def _arrays(element: int, layout: np.dtype[Any], origin: int, content: Sequence[Any]) -> list[bytes]:
    """N lists of numbers as array cells: all elements in one numpy array, cut at the lists' ends."""
    lengths = [0 if each is None else len(each) for each in content]
    number = layout.names[1]  # type: ignore[index]
    flat = np.fromiter(chain.from_iterable(each for each in content if each), layout[number].newbyteorder("="))
    packed = np.empty(len(flat), dtype=layout)
    packed["length"], packed[number] = layout[number].itemsize, flat - origin
    body, ends = packed.tobytes(), accumulate(lengths, initial=0)
    cells = []
    for each, (start, end) in zip(content, pairwise(ends), strict=True):
        cells.append(
            _NULL
            if each is None
            else _array(element, body[start * layout.itemsize : end * layout.itemsize], end - start)
        )
    return cells


def _array(element: int, body: bytes, length: int) -> bytes:
    if length == 0:
        return _EMPTY_ARRAY.pack(12, 0, 0, element)
    return _ARRAY.pack(20 + len(body), 1, 0, element, length, 1) + body

"""JSON text by column: an answer of a hundred candidates without an object for each.

Objects for candidates (and who found each) cost a server more than finding them does: docs/adr/0007.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

OPTIONS = orjson.OPT_UTC_Z | orjson.OPT_SERIALIZE_NUMPY


def json_bytes(value: Any) -> bytes:
    """The value as JSON; NaN and infinities are null, times are RFC 3339."""
    return orjson.dumps(value, option=OPTIONS)


def numbers(values: NDArray[Any]) -> list[str]:
    """Each number [N] as JSON; a 32-bit float in the fewest digits that tell it apart, which is how SQL prints it."""
    if not len(values):
        return []
    return json_bytes(np.ascontiguousarray(values))[1:-1].decode().split(",")


def values(column: Sequence[Any]) -> list[str]:
    """Each value as JSON."""
    return [json_bytes(value).decode() for value in column]


def objects(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """N JSON objects from columns of N JSON values each."""
    template = "{" + ",".join(f'"{name}":%s' for name in columns) + "}"
    return [template % row for row in zip(*columns.values(), strict=True)]


def array(elements: Sequence[str]) -> orjson.Fragment:
    """A JSON array of values that are JSON already, to be put into a document as it is."""
    return orjson.Fragment("[" + ",".join(elements) + "]")

"""Types of what comes from outside: what pydantic refuses here never reaches Postgres."""

import base64
import binascii
from typing import Annotated, Any

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    WithJsonSchema,
)

from feature_repo.schema import MAX_ID_BYTES, MAX_QUERY_CHARACTERS

MAX_K = 1000


def _no_nul(value: str) -> str:
    # Postgres text holds every character but this one.
    if "\x00" in value:
        raise ValueError("holds a NUL character")
    return value


def _short(value: str) -> str:
    # In bytes, as Postgres counts what fits into an index row.
    if len(value.encode()) > MAX_ID_BYTES:
        raise ValueError(f"is longer than {MAX_ID_BYTES} bytes")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    return value


Text = Annotated[str, AfterValidator(_no_nul)]
# Ids of events, which may be left out; of users and items, and kinds.
Key = Annotated[Text, AfterValidator(_short), Field(json_schema_extra={"maxLength": MAX_ID_BYTES})]
Id = Annotated[
    Text,
    AfterValidator(_short),
    AfterValidator(_not_blank),
    Field(json_schema_extra={"minLength": 1, "maxLength": MAX_ID_BYTES}),
]
SearchText = Annotated[Text, Field(min_length=1, max_length=MAX_QUERY_CHARACTERS)]
Value = StrictBool | StrictInt | FiniteFloat | Text
K = Annotated[int, Field(ge=1, le=MAX_K, strict=True)]


def _from_base64(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("is not a string in base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("is not base64") from error


Base64 = Annotated[
    bytes, BeforeValidator(_from_base64), WithJsonSchema({"type": "string", "contentEncoding": "base64"})
]


def _vector(value: Any) -> Any:
    """Little-endian float32 in base64 as a list of numbers; anything else as it is."""
    if not isinstance(value, str):
        return value
    content = _from_base64(value)
    if len(content) % 4:
        raise ValueError("is not a sequence of float32: its length in bytes is no multiple of 4")
    return np.frombuffer(content, "<f4").astype(float).tolist()


_NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 4000}
_BINARY = {"type": "string", "contentEncoding": "base64", "description": "little-endian float32"}
Vector = Annotated[list[FiniteFloat], Field(min_length=1, max_length=4000)]
# The same as JSON has it: numbers, or base64.
BinaryVector = Annotated[Vector, BeforeValidator(_vector), WithJsonSchema({"anyOf": [_NUMBERS, _BINARY]})]


class Strict(BaseModel):
    """An unknown member is a typing error, not something to ignore."""

    model_config = ConfigDict(extra="forbid", frozen=True)

"""Content encoders: what raw content of an item becomes a content embedding, and when it has to be encoded again.

A *revision* names an encoder's weights and options, a *content hash* the content: an embedding is out of date exactly
when one of the two is new. Nothing heavy is imported before an encoder is built.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from feature_repo.schema import Modality

Content = TypeVar("Content", contravariant=True)
Rows = npt.NDArray[np.float32]

# What separates title and description in an item's text.
TEXT_SEPARATOR = ". "

# Everything that prints nothing: Unicode white space, and the zero-width characters that str.isspace leaves out.
BLANK = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\u200b\u2060\ufeff"
)


@dataclass(frozen=True)
class Encoded:
    """One chunk's result.

    embeddings: float32 [n, dim], unit rows in the order of the chunk; a failed content's row is zero.
    failures: row → why that content could not be encoded.
    """

    embeddings: Rows
    failures: Mapping[int, str] = field(default_factory=dict)


class ContentEncoder(Protocol[Content]):
    """What a content encoder is.

    modality: the one it serves. revision: hash of weights and options. model: its name for people. dim: of its
    embeddings. device: where it runs, as torch writes it. config: its options, JSON.
    """

    @property
    def modality(self) -> Modality: ...
    @property
    def revision(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...

    def encode(self, contents: Sequence[Content], batch_size: int | None = None) -> Iterator[Rows]:
        """Unit rows [b, dim], in the order of the contents, some at a time; UserError on the first bad content."""
        ...

    def encode_chunks(self, chunks: Iterable[Sequence[Content]]) -> Iterator[Encoded]:
        """One result per chunk, in order; reads ahead while the model works; a bad content fails alone."""
        ...


def item_text(title: str | None, description: str | None) -> str:
    """An item's text: `title. description`, each without blank edges; "" when both are blank."""
    parts = ((part or "").strip(BLANK) for part in (title, description))
    return TEXT_SEPARATOR.join(part for part in parts if part)


def content_hash(modality: Modality, row: Mapping[str, Any]) -> str | None:
    """Identity of an item's content in one modality, sha256 in hex; None: the item lacks the modality.

    row: the columns of `items`. text hashes `item_text`; image is the picture's own sha256; attributes hash Postgres's
    own notation of the jsonb. pipelines/content_embeddings.py says the same in SQL; a test holds the two equal.
    """
    if modality == "text":
        text = item_text(row.get("title"), row.get("description"))
        return _sha256(text) if text else None
    if modality == "image":
        return (row.get("image_sha256") or None) if row.get("image_path") else None
    attributes = row.get("attributes") or {}
    return _sha256(_jsonb_text(attributes)) if says_something(attributes) else None


def says_something(attributes: Mapping[str, Any]) -> bool:
    """Whether any attribute has a value: null, "", [] and {} are none."""
    return any(value not in (None, "", [], {}) for value in attributes.values())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _jsonb_text(value: Any) -> str:
    """`value::jsonb::text`: keys by length in bytes, then by bytes; numbers without an exponent."""
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda key: (len(key.encode()), key.encode()))
        return "{" + ", ".join(f"{_jsonb_text(key)}: {_jsonb_text(value[key])}" for key in keys) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_jsonb_text(element) for element in value) + "]"
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f").removeprefix("-") if value == 0 else format(Decimal(repr(value)), "f")
    return json.dumps(value, ensure_ascii=False)

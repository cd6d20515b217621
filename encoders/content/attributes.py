"""Attributes → unit vectors by signed feature hashing: no vocabulary, no fitting, the same in every process.

Weinberger et al. 2009 (arXiv 0902.2206), with two deviations: a token has one position in each of four blocks of the
vector instead of one in all (a count sketch's rows), so that two tokens meeting in one place neither merge nor cancel;
and numbers are tokens of soft bins at three resolutions, so that near numbers have near vectors.
"""

import hashlib
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from encoders.content.encoder import Encoded, Rows
from feature_repo.modalities import BLANK, says_something
from polytower.errors import UserError

SCHEME = "signed-hash-v1"
DIM = 256
BLOCKS = 4
RESOLUTIONS = 3
_BATCH = 1024

# Numbers beyond these have no power of ten that a float can hold: they count as 0 and as the bound.
_TINY, _HUGE = 1e-300, 1e300

Token = tuple[str, float]


class AttributesEncoder:
    """Attributes of an item, {name: scalar or list}, as one unit vector.

    A scalar weighs 1; a list weighs 1 in all, each element 1/√n, so that forty actors do not drown one genre. Strings
    are categories (case and outer blanks ignored). A number is linear between the two nearest bins at widths of its own
    order of magnitude, a tenth and a hundredth of it: 1994 and 1995 are near, 1994 and 1954 less so.
    An item whose every value is blank is described by the names of its attributes.
    """

    modality = "attributes"
    device = "cpu"

    def __init__(self, dim: int = DIM) -> None:
        if dim <= 0 or dim % BLOCKS:
            raise UserError(f"attributes are hashed into a multiple of {BLOCKS} dimensions, not {dim}")
        self.dim = dim
        self.model = f"feature hashing ({dim})"
        self.config = {"scheme": SCHEME, "dim": dim, "blocks": BLOCKS, "resolutions": RESOLUTIONS}
        self.revision = hashlib.sha256(f"{SCHEME}/{dim}/{BLOCKS}/{RESOLUTIONS}".encode()).hexdigest()[:12]

    def encode(self, contents: Sequence[Mapping[str, Any]], batch_size: int | None = None) -> Iterator[Rows]:
        """Unit rows [b, dim] in the order of the contents."""
        size = batch_size or _BATCH
        for start in range(0, len(contents), size):
            yield np.stack([self._vector(attributes) for attributes in contents[start : start + size]])

    def encode_chunks(self, chunks: Iterable[Sequence[Mapping[str, Any]]]) -> Iterator[Encoded]:
        """One result per chunk; no attributes fail."""
        for chunk in chunks:
            yield Encoded(np.concatenate([np.empty((0, self.dim), np.float32), *self.encode(chunk)]))

    def _vector(self, attributes: Mapping[str, Any]) -> Rows:
        vector = self._sum(_tokens(attributes))
        norm = np.linalg.norm(vector)
        if not norm:
            vector = self._sum((name, 1.0) for name in attributes or ("",))
            norm = np.linalg.norm(vector)
        return (vector / norm).astype(np.float32)

    def _sum(self, tokens: Iterable[Token]) -> np.ndarray[Any, np.dtype[np.float64]]:
        vector = np.zeros(self.dim)
        for token, weight in tokens:
            for position, sign in _places(token, self.dim):
                vector[position] += sign * weight
        return vector


def user_vectors(users: Sequence[Mapping[str, Any]], dim: int) -> Rows:
    """What is known of users as rows [U, dim], as the user tower reads it: zero rows where that is nothing.

    The same function hashes in experiments, in a generation's build and in the server.
    """
    encoder = AttributesEncoder(dim)
    rows = np.zeros((len(users), dim), np.float32)
    known = [row for row, attributes in enumerate(users) if says_something(attributes)]
    rows[known] = np.concatenate([rows[:0], *encoder.encode([users[row] for row in known])])
    return rows


@lru_cache(maxsize=1 << 16)
def _places(token: str, dim: int) -> tuple[tuple[int, int], ...]:
    """One position and sign in each block. Not Python's hash(): that one differs from process to process."""
    bits = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=BLOCKS * 4).digest(), "little")
    width = dim // BLOCKS
    places = []
    for block in range(BLOCKS):
        word = bits >> (32 * block) & 0xFFFFFFFF
        places.append((block * width + (word >> 1) % width, 1 if word & 1 else -1))
    return tuple(places)


def _tokens(attributes: Mapping[str, Any], prefix: str = "") -> Iterator[Token]:
    for name, value in attributes.items():
        yield from _value_tokens(prefix + name, value)


def _value_tokens(name: str, value: Any) -> Iterator[Token]:
    if isinstance(value, Mapping):
        yield from _tokens(value, f"{name}.")
    elif isinstance(value, (list, tuple)):
        elements = [element for element in value if element is not None]
        for element in elements:
            for token, weight in _value_tokens(name, element):
                yield token, weight / math.sqrt(len(elements))
    elif isinstance(value, bool):
        yield f"{name}={value}", 1.0
    elif isinstance(value, (int, float)):
        yield from _number_tokens(name, value)
    elif isinstance(value, str):
        text = unicodedata.normalize("NFC", value).strip(BLANK).casefold()
        if text:
            yield f"{name}={text}", 1.0


def _number_tokens(name: str, value: float) -> Iterator[Token]:
    """Two neighbouring bins at each resolution, weights √(1−f) and √f: squares sum to 1 over all."""
    if abs(value) < _TINY:
        yield f"{name}#0", 1.0
        return
    value = max(-_HUGE, min(_HUGE, value))
    magnitude = math.floor(math.log10(abs(value)))
    amplitude = 1 / math.sqrt(RESOLUTIONS)
    for exponent in range(magnitude, magnitude - RESOLUTIONS, -1):
        place = value / 10.0**exponent
        below = math.floor(place)
        part = place - below
        yield f"{name}#{exponent}#{below}", amplitude * math.sqrt(1 - part)
        if part:
            yield f"{name}#{exponent}#{below + 1}", amplitude * math.sqrt(part)

"""Content encoders: what raw content of an item becomes a content embedding, and when it has to be encoded again.

A *revision* names an encoder's weights and options, a *content hash* the content: an embedding is out of date exactly
when one of the two is new. Nothing heavy is imported before an encoder is built.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Content = TypeVar("Content", contravariant=True)
Rows = npt.NDArray[np.float32]


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
    def modality(self) -> str: ...
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

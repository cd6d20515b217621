"""One retrieval question, and the interests that it becomes: what HTTP, the command line, SQL and memory share.

HTTP reads one from JSON (serving/models.py), the command line from its options (polytower/commands/retrieve.py); the
statements (serving/queries.py) and the index in memory (serving/memory/item_index.py) are asked with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, model_validator

from serving.field_types import Id, K, SearchText, Strict, Text, Value, Vector

Merge = Literal["max", "quota", "rrf", "soft", "diverse"]
Space = Literal["item", "content", "id"]
Source = Literal["stored", "online", "given", "content"]
MAX_CONDITIONS = 100  # attributes of a filter


class Diversity(Strict):
    """What the merge `diverse` weighs against scores."""

    attribute: Annotated[Text, Field(max_length=1024)] = Field(description="of the items; scalars or lists")
    weight: Annotated[FiniteFloat, Field(ge=0, le=1000)] = Field(
        description="worth of each candidate already picked that shares no value of the attribute"
    )


class Question(Strict):
    """Candidates for one of: a user, a raw history, given vectors, a text or picture (or both as one question).

    A user or a history with a text is a personalised search: what this user would take who searches for this.
    """

    user_id: Id | None = Field(default=None, description="a known user")
    history: list[Id] | None = Field(
        default=None, min_length=1, max_length=10_000, description="item ids, oldest first"
    )
    attributes: dict[Text, Value | list[Value]] | None = Field(
        default=None,
        max_length=200,
        description="what is known of somebody with this history, or without one; for generations that read attributes",
    )
    vectors: list[Vector] | None = Field(default=None, min_length=1, max_length=64, description="interests, [K, D]")
    weights: list[FiniteFloat] | None = Field(default=None, description="one per vector; default equal")
    text: SearchText | None = Field(
        default=None,
        description="what to look for; with a user_id or a history, what this user searches for (for generations whose"
        " towers read queries, such as those of the preset seminar)",
    )
    image: bytes | None = Field(default=None, min_length=1, description="a JPEG, PNG or WebP file")
    space: Space | None = Field(
        default=None,
        description="where vectors, texts and pictures are looked for: by content alone (the default of text and image)"
        ", by content and behaviour (item; the default of vectors), by behaviour alone (id; vectors only)",
    )
    k: K = 100
    filter: dict[str, Any] = Field(
        default_factory=dict, max_length=MAX_CONDITIONS, description="conditions on attributes, all of which must hold"
    )
    exclude_seen: bool = Field(default=True, description="leave out what the user (or the history) has already seen")
    exclude: list[Id] = Field(default_factory=list, max_length=10_000, description="item ids to leave out")
    allow: list[Id] | None = Field(default=None, max_length=10_000, description="only these item ids; default all")
    merge: Merge = "max"
    diversity: Diversity | None = Field(default=None, description="goes with merge = diverse, and only with it")
    fields: list[Literal["title"]] = Field(
        default_factory=list, max_length=1, description="further fields of candidates"
    )
    found_by: bool = Field(default=True, description="whether candidates list all interests that found them")
    features: Annotated[Text, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="a feature service, such as ranker: its values for every candidate"
    )
    similarity: bool = Field(
        default=False, description="similarity of every candidate to the user's history and interests"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = {
            "user_id": self.user_id is not None,
            "history or attributes": self.history is not None or self.attributes is not None,
            "vectors": self.vectors is not None,
            "text or image": self.asks_by_content,
        }
        given = [name for name, there in sources.items() if there]
        if len(given) != 1:
            raise ValueError(
                f"give one of {', '.join(sources)}; this question has {', '.join(given) or 'none'} (a text alone may go"
                " with a user_id, a history or attributes: what this user searches for)"
            )
        if self.weights is not None and self.vectors is None:
            raise ValueError("weights go with vectors only")
        if self.space is not None and (self.user_id is not None or self.history is not None):
            raise ValueError("space goes with vectors, text and image: interests lie in the item space")
        if self.space == "id" and self.asks_by_content:
            raise ValueError("a text or picture has no place in the id space; ask in content or item")
        return self

    @property
    def asks_by_content(self) -> bool:
        """Whether the question is a text, a picture, or both, and not a user's search."""
        return (self.text is not None or self.image is not None) and not self.is_search

    @property
    def is_search(self) -> bool:
        """Whether somebody searches: a text with a user, a history or attributes."""
        somebody = self.user_id is not None or self.history is not None or self.attributes is not None
        return self.text is not None and self.image is None and somebody

    @property
    def is_ranked(self) -> bool:
        """Whether candidates come with features."""
        return self.features is not None or self.similarity

    @property
    def searched_space(self) -> Space:
        """The space that is searched."""
        return self.space or ("content" if self.asks_by_content else "item")


@dataclass(frozen=True)
class Interests:
    """What a question has become: the K vectors that are searched for, of D values that 16 bits hold.

    numbers: what candidates call them. weights: None for equal. banned: items to leave out, in addition to those that
    the question names. skipped: items of the history that the generation does not know. degraded: why the answer is
    less than it could be.
    """

    source: Source
    vectors: Sequence[NDArray[np.float32]] | NDArray[np.float32]
    weights: Sequence[float] | None
    numbers: Sequence[int]
    banned: Sequence[str] = ()
    skipped: list[str] = field(default_factory=list)
    degraded: str | None = None

    @cached_property
    def matrix(self) -> NDArray[np.float32] | None:
        """The vectors as float32 [K, D]; None where they differ in width."""
        if isinstance(self.vectors, np.ndarray):
            return self.vectors
        return None if len({len(vector) for vector in self.vectors}) != 1 else np.stack(self.vectors)

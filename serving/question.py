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
from pydantic import AfterValidator, Field, FiniteFloat, model_validator

from feature_repo.modalities import MODALITIES
from feature_repo.schema import SPACES
from serving.field_types import Id, K, SearchText, Strict, Text, Value, Vector

Merge = Literal["max", "quota", "rrf", "soft", "diverse", "sum"]
# Those of a generation, and the content encoders' own: what each modality's encoder makes of items, as they are now.
SPACE_NAMES = (*SPACES, *MODALITIES)


def _known_space(name: str) -> str:
    if name not in SPACE_NAMES:
        raise ValueError(f"no space is called {name!r}; there are {', '.join(SPACE_NAMES)}")
    return name


Space = Annotated[str, AfterValidator(_known_space), Field(json_schema_extra={"enum": [*SPACE_NAMES]})]
Source = Literal["stored", "online", "given", "content"]
MAX_CONDITIONS = 100  # attributes of a filter
MAX_RELEVANT = 200  # items of a history, for each candidate


class Diversity(Strict):
    """What the merge `diverse` weighs against scores."""

    attribute: Annotated[Text, Field(max_length=1024)] = Field(description="of the items; scalars or lists")
    weight: Annotated[FiniteFloat, Field(ge=0, le=1000)] = Field(
        description="worth of each candidate already picked that shares no value of the attribute"
    )


class Question(Strict):
    """Candidates for one of: a user, a raw history, given vectors, a text or picture (or both as one question).

    A user or a history may come with a text or picture. Generations whose towers read queries tell what this user would
    take who searches for this text; else, or with mix, candidates are weighed by both.
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
    weights: list[FiniteFloat] | None = Field(
        default=None, description="one per vector, default equal; negative for merge = sum: like these, not like that"
    )
    text: SearchText | None = Field(
        default=None,
        description="what to look for; with a user_id or a history, what this user searches for: generations whose"
        " towers read queries (preset seminar) answer by these, others by both (mix)",
    )
    image: bytes | None = Field(default=None, min_length=1, description="a JPEG, PNG or WebP file")
    space: Space | None = Field(
        default=None,
        description="where vectors, texts and pictures are looked for: as the encoder sees items (text, image, …; the"
        " default of a text or a picture), by content as the towers see it (the default of both together), by content"
        " and behaviour (item; the default of vectors), by behaviour alone (id; vectors only)",
    )
    mix: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="share of the text or picture in the score where a user (or history) is given with it; default 0.5,"
        " or what the generation's towers make of both",
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
    relevant: Annotated[int, Field(ge=1, le=MAX_RELEVANT)] | None = Field(
        default=None, description="how many items of the user's long history to name that are most like each candidate"
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
        if len(given) != 1 and not self.is_mixed:
            raise ValueError(f"give one of {', '.join(sources)}; this question has {', '.join(given) or 'none'}")
        if self.weights is not None and self.vectors is None:
            raise ValueError("weights go with vectors only")
        if self.space is not None and not (self.asks_by_content or self.vectors is not None):
            raise ValueError("space goes with vectors, text and image: interests lie in the item space")
        if self.asks_by_content and self.searched_space not in self._content_spaces:
            raise ValueError(
                f"{self._asked_with} has no place in the {self.space} space; ask in {' or '.join(self._content_spaces)}"
            )
        if self.mix is not None and not self.is_mixed:
            raise ValueError("mix goes with a user (or history) and a text or picture")
        if self.is_mixed and not self.may_search and self.merge != "max":
            raise ValueError("a user with a text or picture is answered by merge = max alone")
        return self

    @property
    def asks_by_content(self) -> bool:
        """Whether there is a text, a picture, or both."""
        return self.text is not None or self.image is not None

    @property
    def is_mixed(self) -> bool:
        """Whether a user, or somebody by history or attributes, comes with a text or picture."""
        somebody = [self.user_id is not None, self.history is not None or self.attributes is not None]
        return self.asks_by_content and self.vectors is None and sum(somebody) == 1

    @property
    def may_search(self) -> bool:
        """Whether towers that read queries answer a mixed question: a text alone, and nothing said of how to mix."""
        return self.is_mixed and self.image is None and self.mix is None and self.space is None

    @property
    def is_ranked(self) -> bool:
        """Whether candidates come with features."""
        return self.features is not None or self.similarity or self.relevant is not None

    @property
    def searched_space(self) -> Space:
        """The space that is searched for vectors, a text or a picture."""
        return self.space or (self._content_spaces[0] if self.asks_by_content else "item")

    @property
    def share(self) -> float:
        """Of the text or picture in the score of a mixed question."""
        return 0.5 if self.mix is None else self.mix

    @property
    def _content_spaces(self) -> tuple[str, ...]:
        """Where this text or picture may be looked for, the default first. Only towers make one vector of both."""
        alone = () if self.text is not None and self.image is not None else ("image" if self.text is None else "text",)
        return (*alone, "content", "item")

    @property
    def _asked_with(self) -> str:
        return "a picture" if self.text is None else "a text" if self.image is None else "a text with a picture"


@dataclass(frozen=True)
class Interests:
    """What a question has become: the K vectors that are searched for, of D values that 16 bits hold.

    numbers: what candidates call them. weights: None for equal. banned: items to leave out, in addition to those that
    the question names. skipped: items of the history that the generation does not know, or cannot read any more.
    degraded: why the answer is less than it could be. content: what a text or picture that comes with a user is in the
    searched space, [E].
    """

    source: Source
    vectors: Sequence[NDArray[np.float32]] | NDArray[np.float32]
    weights: Sequence[float] | None
    numbers: Sequence[int]
    banned: Sequence[str] = ()
    skipped: list[str] = field(default_factory=list)
    degraded: str | None = None
    content: NDArray[np.float32] | None = None

    @cached_property
    def matrix(self) -> NDArray[np.float32] | None:
        """The vectors as float32 [K, D]; None where they differ in width."""
        if isinstance(self.vectors, np.ndarray):
            return self.vectors
        return None if len({len(vector) for vector in self.vectors}) != 1 else np.stack(self.vectors)

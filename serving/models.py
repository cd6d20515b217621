"""Requests and responses of the HTTP API, typed; what pydantic refuses here never reaches Postgres."""

import base64
import binascii
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    WithJsonSchema,
    create_model,
    model_validator,
)

from feature_repo.modalities import MODALITIES
from feature_repo.schema import DEFAULT_KIND, MAX_ID_BYTES, MAX_QUERY_CHARACTERS

Merge = Literal["max", "quota", "rrf", "soft", "diverse"]
Space = Literal["item", "content", "id"]
MAX_K = 1000
MAX_CONDITIONS = 100  # attributes of a filter


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
Vector = Annotated[
    list[FiniteFloat],
    Field(min_length=1, max_length=4000),
    BeforeValidator(_vector),
    WithJsonSchema({"anyOf": [_NUMBERS, _BINARY]}),
]


class Strict(BaseModel):
    """An unknown member is a typing error, not something to ignore."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Diversity(Strict):
    """What the merge `diverse` weighs against scores."""

    attribute: Annotated[Text, Field(max_length=1024)] = Field(description="of the items; scalars or lists")
    weight: Annotated[FiniteFloat, Field(ge=0, le=1000)] = Field(
        description="worth of each candidate already picked that shares no value of the attribute"
    )


class RetrieveRequest(Strict):
    """Candidates for one of: a user, a raw history, given vectors, a text or picture (or both as one question)."""

    user_id: Id | None = Field(None, description="a known user")
    history: list[Id] | None = Field(None, min_length=1, max_length=10_000, description="item ids, oldest first")
    attributes: dict[Text, Value | list[Value]] | None = Field(
        None,
        max_length=200,
        description="what is known of somebody with this history, or without one; for generations that read attributes",
    )
    vectors: list[Vector] | None = Field(None, min_length=1, max_length=64, description="interests, [K, D]")
    weights: list[FiniteFloat] | None = Field(None, description="one per vector; default equal")
    text: SearchText | None = Field(None, description="what to look for")
    image: Base64 | None = Field(None, min_length=1, description="a JPEG, PNG or WebP file in base64")
    space: Space | None = Field(
        None,
        description="where vectors, texts and pictures are looked for: by content alone (the default of text and image)"
        ", by content and behaviour (item; the default of vectors), by behaviour alone (id; vectors only)",
    )
    k: K = 100
    filter: dict[str, Any] = Field(
        default_factory=dict, max_length=MAX_CONDITIONS, description="conditions on attributes, all of which must hold"
    )
    exclude_seen: bool = Field(True, description="leave out what the user (or the history) has already seen")
    exclude: list[Id] = Field(default_factory=list, max_length=10_000, description="item ids to leave out")
    allow: list[Id] | None = Field(None, max_length=10_000, description="only these item ids; default all")
    merge: Merge = "max"
    diversity: Diversity | None = Field(None, description="goes with merge = diverse, and only with it")
    fields: list[Literal["title"]] = Field(
        default_factory=list, max_length=1, description="further fields of candidates"
    )
    found_by: bool = Field(True, description="whether candidates list all interests that found them")
    features: Annotated[Text, Field(min_length=1, max_length=200)] | None = Field(
        None, description="a feature service, such as ranker: its values for every candidate"
    )
    similarity: bool = Field(False, description="similarity of every candidate to the user's history and interests")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "196", "k": 10, "fields": ["title"]},
                {"history": ["50", "181", "172"], "k": 10, "filter": {"genres": {"any": ["Comedy", "Drama"]}}},
                {"vectors": [[0.6, 0.8], [1.0, 0.0]], "weights": [0.7, 0.3], "k": 10, "merge": "quota"},
                {"text": "a heist that goes wrong", "k": 10},
            ]
        }
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
            raise ValueError(f"give one of {', '.join(sources)}; this request has {given or 'none'}")
        if self.weights is not None and self.vectors is None:
            raise ValueError("weights go with vectors only")
        if self.space is not None and (self.user_id is not None or self.history is not None):
            raise ValueError("space goes with vectors, text and image: interests lie in the item space")
        if self.space == "id" and self.asks_by_content:
            raise ValueError("a text or picture has no place in the id space; ask in content or item")
        return self

    @property
    def asks_by_content(self) -> bool:
        """Whether the question is a text, a picture, or both."""
        return self.text is not None or self.image is not None

    @property
    def is_ranked(self) -> bool:
        """Whether candidates come with features."""
        return self.features is not None or self.similarity

    @property
    def searched_space(self) -> Space:
        """The space that is searched."""
        return self.space or ("content" if self.asks_by_content else "item")


class BatchRequest(Strict):
    """Several questions, answered from one generation."""

    requests: list[RetrieveRequest] = Field(min_length=1, max_length=64)

    model_config = ConfigDict(json_schema_extra={"examples": [{"requests": [{"user_id": "196"}, {"user_id": "186"}]}]})


_HISTOGRAM: Any = (list[float] | None, Field(description="log(1 + events) per bin of the cosine, width .1 from -1"))
_Similarities: Any = create_model("_Similarities", **{one.similarity: _HISTOGRAM for one in MODALITIES.values()})


class SimilarityModel(_Similarities):  # type: ignore[misc]
    """How close a candidate is to what the user did. Null: the item has no such content, or no embedding."""

    interest_max: float | None = Field(description="cosine with the closest interest of the live generation")
    interest_mean: float | None


class FoundModel(BaseModel):
    """One interest that found a candidate."""

    interest: int
    rank: int = Field(description="the candidate's rank within that interest")
    score: float


class CandidateModel(BaseModel):
    """One candidate, with where it comes from."""

    item_id: str
    score: float = Field(
        description="inner product of unit vectors (or the fused score of rrf and soft); higher is better"
    )
    rank: int
    interest: int = Field(description="number of the interest that gave the score")
    interest_rank: int = Field(description="rank within that interest")
    found_by: list[FoundModel] | None = Field(
        None, description="all interests that found it, as deep as they were searched"
    )
    title: str | None = None
    features: dict[str, Any] | None = Field(None, description="the service's features of the item")
    similarity: SimilarityModel | None = None


# Examples of the OpenAPI document.
_ANSWER: dict[str, Any] = {
    "generation": 1,
    "interests": "stored",
    "candidates": [
        {
            "item_id": "50",
            "score": 0.54,
            "rank": 1,
            "interest": 1,
            "interest_rank": 1,
            "found_by": [{"interest": 1, "rank": 1, "score": 0.54}],
        }
    ],
    "skipped": [],
    "degraded": None,
}


class RetrieveAnswer(BaseModel):
    """Candidates of one generation, best first."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ANSWER]})

    generation: int
    interests: Literal["stored", "online", "given", "content"] = Field(
        description="stored with the generation, computed just now from the newest events, given in the request, or"
        " made of its text or picture"
    )
    candidates: list[CandidateModel]
    skipped: list[str] = Field(
        default_factory=list, description="items of the history that the generation does not know"
    )
    degraded: str | None = Field(None, description="why this answer is less than it could be")
    user_features: dict[str, Any] | None = Field(None, description="the service's features of the user")


class ProblemModel(BaseModel):
    """RFC 9457."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "/problems/unknown-user",
                    "title": "Unknown user",
                    "status": 404,
                    "detail": 'there is no user "nobody"',
                    "request_id": "9f2c64d1a8e05b37",
                }
            ]
        }
    )

    type: str = Field(examples=["/problems/unknown-user"])
    title: str = Field(examples=["Unknown user"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=['there is no user "nobody"'])
    request_id: str = Field(
        description="also in the header X-Request-Id, and in the server's log", examples=["9f2c64d1a8e05b37"]
    )


class BatchAnswer(BaseModel):
    """One answer or problem for each request, in the order of the requests."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "answers": [
                        _ANSWER,
                        {
                            "type": "/problems/unknown-user",
                            "title": "Unknown user",
                            "status": 404,
                            "detail": 'there is no user "186"',
                            "request_id": "9f2c64d1a8e05b37",
                        },
                    ]
                }
            ]
        }
    )

    answers: list[RetrieveAnswer | ProblemModel]


class NeighbourModel(BaseModel):
    """One item near another."""

    item_id: str
    score: float
    rank: int
    title: str | None = None


class SimilarAnswer(BaseModel):
    """Items near another in one space, best first."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"generation": 1, "space": "content", "items": [{"item_id": "51", "score": 0.93, "rank": 1}]}]
        }
    )

    generation: int
    space: Space
    items: list[NeighbourModel]


class InterestModel(BaseModel):
    """One interest of a user."""

    interest: int
    weight: float
    embedding: list[float] | str = Field(description="numbers, or little-endian float32 in base64 if asked for")
    as_of: datetime = Field(description="the newest event that it knows; 1970: there was none")


class InterestsAnswer(BaseModel):
    """A user's interests in the live generation."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "generation": 1,
                    "interests": [
                        {"interest": 0, "weight": 1.0, "embedding": [0.6, 0.8], "as_of": "2026-01-01T00:00:00Z"}
                    ],
                }
            ]
        }
    )

    generation: int
    interests: list[InterestModel]


class InteractionModel(Strict):
    """One event. Without a time it happened now; with an event id it can be sent again safely."""

    user_id: Id
    item_id: Id
    occurred_at: AwareDatetime | None = None
    event_id: Key = ""
    kind: Id = DEFAULT_KIND
    value: FiniteFloat | None = None
    query: Annotated[Text, Field(max_length=MAX_QUERY_CHARACTERS)] | None = None


class InteractionsRequest(Strict):
    """Events, oldest first: taken all or none."""

    interactions: list[InteractionModel] = Field(min_length=1, max_length=1000)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"interactions": [{"user_id": "196", "item_id": "50", "event_id": "7d1f", "kind": "play"}]}]
        }
    )


class InteractionsAnswer(BaseModel):
    """How many events were new, and how many had been taken before."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"accepted": 1, "duplicates": 0}]})

    accepted: int
    duplicates: int


class FeaturesRequest(Strict):
    """Entities × feature service, or their similarities, or both."""

    service: Annotated[Text, Field(min_length=1, max_length=200)] | None = None
    similarity: bool = Field(
        False, description="similarity of every item to its user's history and interests, as of now"
    )
    entities: dict[str, Annotated[list[Id], Field(min_length=1, max_length=5000)]] = Field(min_length=1, max_length=4)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"service": "ranker", "entities": {"user_id": ["196", "196"], "item_id": ["50", "181"]}}]
        }
    )

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len({len(values) for values in self.entities.values()}) != 1:
            raise ValueError("every entity names as many values: row n is made of the n-th of each")
        if self.service is None and not self.similarity:
            raise ValueError("give a service, or similarity, or both")
        if self.similarity and not {"user_id", "item_id"} <= self.entities.keys():
            raise ValueError("similarity is between a user and an item: give user_id and item_id")
        return self


class FeaturesAnswer(BaseModel):
    """One row per entity row, one member per feature."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"rows": [{"user_id": "196", "item_id": "50", "item_interactions": 583, "title": "A title"}]}]
        }
    )

    rows: list[Mapping[str, Any]]


class GenerationModel(BaseModel):
    """One generation."""

    generation: int
    state: Literal["building", "ready", "live", "retired", "failed"]
    dim: int
    interests: int
    created_at: datetime
    live_at: datetime | None
    metrics: dict[str, Any]


class GenerationsAnswer(BaseModel):
    """Generations, newest first."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "generations": [
                        {
                            "generation": 1,
                            "state": "live",
                            "dim": 64,
                            "interests": 2,
                            "created_at": "2026-01-01T00:00:00Z",
                            "live_at": "2026-01-01T00:10:00Z",
                            "metrics": {},
                        }
                    ]
                }
            ]
        }
    )

    generations: list[GenerationModel]


class Health(BaseModel):
    """The process answers."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ok"}]})

    status: Literal["ok"]


class Ready(BaseModel):
    """Postgres answers, and a generation is live."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ready", "generation": 1}]})

    status: Literal["ready"]
    generation: int

"""Requests and responses of the HTTP API, typed; serving/question.py holds what a question is."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat, create_model, model_validator

from feature_repo.modalities import MODALITIES
from feature_repo.schema import DEFAULT_KIND, MAX_QUERY_CHARACTERS
from serving.field_types import Base64, BinaryVector, Id, Key, Strict, Text
from serving.question import MAX_RELEVANT, Question, Source, Space


class RetrieveRequest(Question):
    """Candidates for one of: a user, a raw history, given vectors, a text or picture (or both as one question).

    A user or a history may come with a text or picture: candidates are then weighed by both (mix).
    """

    vectors: list[BinaryVector] | None = Field(None, min_length=1, max_length=64, description="interests, [K, D]")
    image: Base64 | None = Field(None, min_length=1, description="a JPEG, PNG or WebP file in base64")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "196", "k": 10, "fields": ["title"]},
                {"history": ["50", "181", "172"], "k": 10, "filter": {"genres": {"any": ["Comedy", "Drama"]}}},
                {"vectors": [[0.6, 0.8], [1.0, 0.0]], "weights": [0.7, 0.3], "k": 10, "merge": "quota"},
                {"text": "a heist that goes wrong", "k": 10},
                {"user_id": "196", "text": "a heist that goes wrong", "mix": 0.7, "k": 10},
            ]
        }
    )


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


class RelevantModel(BaseModel):
    """What of the user's newest 10,000 events matters for a candidate. Null: the candidate has no content codes."""

    relevant_items: list[str] | None = Field(description="items of the history that are most like it, best first")
    relevant_scores: list[float] | None = Field(description="products of the two contents, as far as codes keep them")
    relevant_attention: list[float] | None = Field(description="softmax of the scores")
    relevant_histogram: list[float] | None = Field(
        description="log(1 + events) per bin of the cosine, width .1 from -1; over all events"
    )
    semantic_id: list[int] | None = Field(description="the candidate as few numbers, the coarsest first")
    code_set: int | None = Field(description="the set of codes that semantic_id belongs to")


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
    relevant: RelevantModel | None = None


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
    interests: Source = Field(
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
    """Entities × feature service, or their similarities, or what of a long history is relevant, or all of it."""

    service: Annotated[Text, Field(min_length=1, max_length=200)] | None = None
    similarity: bool = Field(
        False, description="similarity of every item to its user's history and interests, as of now"
    )
    relevant: Annotated[int, Field(ge=1, le=MAX_RELEVANT)] | None = Field(
        None, description="how many items of the user's long history to name that are most like each item, as of now"
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
        if self.service is None and not self.of_pairs:
            raise ValueError("give a service, similarity, relevant, or several of them")
        if self.of_pairs and not {"user_id", "item_id"} <= self.entities.keys():
            raise ValueError("similarity and relevant are between a user and an item: give user_id and item_id")
        return self

    @property
    def of_pairs(self) -> bool:
        """Whether something is asked that needs a user and an item."""
        return self.similarity or self.relevant is not None


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

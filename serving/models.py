"""Requests and responses of the HTTP API, typed; what pydantic refuses here never reaches Postgres."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

Merge = Literal["max", "quota", "rrf", "diverse"]
Space = Literal["item", "content", "id"]
MAX_K = 1000


def _no_nul(value: str) -> str:
    # Postgres text holds every character but this one.
    if "\x00" in value:
        raise ValueError("holds a NUL character")
    return value


Text = Annotated[str, AfterValidator(_no_nul)]
Id = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_no_nul)]
K = Annotated[int, Field(ge=1, le=MAX_K, strict=True)]
Vector = Annotated[list[FiniteFloat], Field(min_length=1, max_length=4000)]


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
    """Candidates for one of: a user, a raw history, given interest vectors."""

    user_id: Id | None = Field(None, description="a known user")
    history: list[Id] | None = Field(None, min_length=1, max_length=10_000, description="item ids, oldest first")
    vectors: list[Vector] | None = Field(None, min_length=1, max_length=64, description="interests, [K, D]")
    weights: list[FiniteFloat] | None = Field(None, description="one per vector; default equal")
    k: K = 100
    filter: dict[str, Any] = Field(default_factory=dict, description="conditions on attributes, all of which must hold")
    exclude_seen: bool = Field(True, description="leave out what the user (or the history) has already seen")
    exclude: list[Id] = Field(default_factory=list, max_length=10_000, description="item ids to leave out")
    allow: list[Id] | None = Field(None, max_length=10_000, description="only these item ids; default all")
    merge: Merge = "max"
    diversity: Diversity | None = Field(None, description="goes with merge = diverse, and only with it")
    fields: list[Literal["title"]] = Field(
        default_factory=list, max_length=1, description="further fields of candidates"
    )

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "196", "k": 10, "fields": ["title"]},
                {"history": ["50", "181", "172"], "k": 10, "filter": {"genres": {"any": ["Comedy", "Drama"]}}},
                {"vectors": [[0.6, 0.8], [1.0, 0.0]], "weights": [0.7, 0.3], "k": 10, "merge": "quota"},
            ]
        }
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("user_id", "history", "vectors") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of user_id, history and vectors; this request has {given or 'none'}")
        if self.weights is not None and self.vectors is None:
            raise ValueError("weights go with vectors only")
        return self


class BatchRequest(Strict):
    """Several questions, answered from one generation."""

    requests: list[RetrieveRequest] = Field(min_length=1, max_length=64)

    model_config = ConfigDict(json_schema_extra={"examples": [{"requests": [{"user_id": "196"}, {"user_id": "186"}]}]})


class FoundModel(BaseModel):
    """One interest that found a candidate."""

    interest: int
    rank: int = Field(description="the candidate's rank within that interest")
    score: float


class CandidateModel(BaseModel):
    """One candidate, with where it comes from."""

    item_id: str
    score: float = Field(description="inner product of unit vectors (or the fused score of rrf); higher is better")
    rank: int
    interest: int = Field(description="number of the interest that gave the score")
    interest_rank: int = Field(description="rank within that interest")
    found_by: list[FoundModel] = Field(description="all interests that found it, as deep as they were searched")
    title: str | None = None


class RetrieveAnswer(BaseModel):
    """Candidates of one generation, best first."""

    generation: int
    interests: Literal["stored", "online", "given"] = Field(
        description="stored with the generation, computed just now from the newest events, or given in the request"
    )
    candidates: list[CandidateModel]
    skipped: list[str] = Field(
        default_factory=list, description="items of the history that the generation does not know"
    )
    degraded: str | None = Field(None, description="why this answer is less than it could be")


class ProblemModel(BaseModel):
    """RFC 9457."""

    type: str = Field(examples=["/problems/unknown-user"])
    title: str = Field(examples=["Unknown user"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=['there is no user "nobody"'])


class BatchAnswer(BaseModel):
    """One answer or problem for each request, in the order of the requests."""

    answers: list[RetrieveAnswer | ProblemModel]


class NeighbourModel(BaseModel):
    """One item near another."""

    item_id: str
    score: float
    rank: int
    title: str | None = None


class SimilarAnswer(BaseModel):
    """Items near another in one space, best first."""

    generation: int
    space: Space
    items: list[NeighbourModel]


class InterestModel(BaseModel):
    """One interest of a user."""

    interest: int
    weight: float
    embedding: list[float]
    as_of: datetime = Field(description="the newest event that it knows")


class InterestsAnswer(BaseModel):
    """A user's interests in the live generation."""

    generation: int
    interests: list[InterestModel]


class InteractionModel(Strict):
    """One event. Without a time it happened now; with an event id it can be sent again safely."""

    user_id: Id
    item_id: Id
    occurred_at: AwareDatetime | None = None
    event_id: Annotated[Text, Field(max_length=1024)] = ""
    kind: Annotated[Text, Field(min_length=1, max_length=1024)] = "interaction"
    value: FiniteFloat | None = None
    query: Annotated[Text, Field(max_length=10_000)] | None = None


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

    accepted: int
    duplicates: int


class FeaturesRequest(Strict):
    """Entities × feature service."""

    service: Annotated[Text, Field(min_length=1, max_length=200)]
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
        return self


class FeaturesAnswer(BaseModel):
    """One row per entity row, one member per feature."""

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

    generations: list[GenerationModel]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Ready(BaseModel):
    """Postgres answers, and a generation is live."""

    status: Literal["ready"]
    generation: int

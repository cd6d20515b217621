"""The endpoints: each borrows a connection, asks one question and writes its answer."""

import asyncio
from base64 import b64encode
from typing import TYPE_CHECKING, Annotated, Any, Literal

import psycopg
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from orjson import Fragment
from pgvector import HalfVector
from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from serving import queries
from serving.database import Session
from serving.errors import NOT_READY, PROBLEMS, Problem, from_postgres
from serving.field_types import MAX_K, Id
from serving.http import interactions
from serving.http.openapi import CONFLICT, UNREADY
from serving.http.reading import json_of
from serving.json_columns import json_bytes
from serving.loaded.content_queries import ContentVector
from serving.models import (
    BatchAnswer,
    BatchRequest,
    FeaturesAnswer,
    FeaturesRequest,
    GenerationsAnswer,
    Health,
    InteractionsAnswer,
    InteractionsRequest,
    InterestsAnswer,
    Ready,
    RetrieveAnswer,
    RetrieveRequest,
    SimilarAnswer,
)
from serving.queries import Interest, Neighbour
from serving.question import MAX_CONDITIONS, Question, Space
from serving.rank.feature_service import ARROW, as_arrow, with_columns
from serving.rank.features import json_rows
from serving.rank.ranking import Ranked

if TYPE_CHECKING:
    import pyarrow as pa

probes = APIRouter(tags=["operation"])
v1 = APIRouter(prefix="/v1")


def _json(content: Any) -> Response:
    # Written straight from rows: validating a thousand candidates on the way out costs more than finding them.
    written = content if isinstance(content, bytes) else json_bytes(content)
    return Response(written, media_type="application/json")


_ARROW = {"content": {ARROW: {"schema": {"type": "string", "format": "binary"}}}}


@v1.post("/retrieve", response_model=RetrieveAnswer, tags=["retrieval"], responses={200: _ARROW, **CONFLICT})
async def retrieve(question: RetrieveRequest, request: Request) -> Response:
    """Candidates for a user, a raw history, given vectors, a text or a picture; filtered before the cut, merged."""
    try:
        ranked = await _ranked(question, request)
    except (psycopg.Error, Problem) as error:
        if (error if isinstance(error, Problem) else from_postgres(error)).kind is not PROBLEMS["PT013"]:
            raise
        # The generation was dropped, or replaced, under the request: the next one is live.
        ranked = await _ranked(question, request)
    if _wants_arrow(request):
        return Response(as_arrow(ranked.as_table()), media_type=ARROW)
    return _json(ranked.as_json())


async def _ranked(question: Question, request: Request) -> Ranked:
    state = request.app.state
    content = await state.content.embed(question) if question.asks_by_content else None
    if not question.is_ranked:
        async with state.database.connection() as connection:
            return Ranked(question, await state.retrieval.answer(connection, question, content))
    async with state.database.snapshot() as connection:
        await _check_live(connection, content)
        answer = await state.retrieval.answer(connection, question, content)
        ranked: Ranked = await state.ranking.complete(connection, question, answer)
    return ranked


async def _check_live(connection: Session, content: ContentVector | None) -> None:
    """A text or picture was embedded before the snapshot: refuses it if another generation is live by now."""
    if content is not None and content.generation != await _live(connection):
        raise Problem(PROBLEMS["PT013"], "another generation went live while the question was read; try again")


@v1.post("/retrieve:batch", response_model=BatchAnswer, tags=["retrieval"])
async def retrieve_batch(batch: BatchRequest, request: Request) -> Response:
    """Several questions over one snapshot, and so one generation; a question that fails leaves the others alone."""
    _charge(request, len(batch.requests) - 1)
    embedded = await asyncio.gather(*(_embedded(question, request) for question in batch.requests))
    async with request.app.state.database.snapshot() as connection:
        answers = [
            await _one_of_batch(request, connection, question, content)
            for question, content in zip(batch.requests, embedded, strict=True)
        ]
    return _json({"answers": answers})


def _charge(request: Request, further: int) -> None:
    """A batch counts as many requests as it holds against the key's rate."""
    key = getattr(request.state, "key", None)
    if key is not None:
        request.app.state.ring.charge(key, further)


async def _embedded(question: Question, request: Request) -> ContentVector | Problem | None:
    """What a question by content is embedded as, or the problem with it."""
    if not question.asks_by_content:
        return None
    try:
        vector: ContentVector = await request.app.state.content.embed(question)
    except Problem as problem:
        return problem
    return vector


async def _one_of_batch(
    request: Request, connection: Session, question: Question, content: ContentVector | Problem | None
) -> Fragment | dict[str, Any]:
    state = request.app.state
    try:
        if isinstance(content, Problem):
            raise content
        await _check_live(connection, content)
        async with connection.transaction():
            answer = await state.retrieval.answer(connection, question, content)
        ranked = Ranked(question, answer)
        if question.is_ranked:
            ranked = await state.ranking.complete(connection, question, answer)
        return Fragment(ranked.as_json())
    except Problem as refusal:
        return refusal.as_json()
    except psycopg.Error as error:
        problem = from_postgres(error)
        if problem.kind.status >= 500:
            raise
        return problem.as_json()


Filter = Annotated[
    str, Query(description="JSON, as in /retrieve", max_length=10_000, examples=['{"genres": "Comedy"}'])
]


@v1.get("/items/{item_id:path}/similar", response_model=SimilarAnswer, tags=["retrieval"])
async def similar(
    request: Request,
    item_id: Annotated[Id, Path(examples=["50"])],
    k: Annotated[int, Query(ge=1, le=MAX_K, examples=[10])] = 10,
    space: Annotated[Space, Query(examples=["content"])] = "item",
    filter: Filter = "{}",  # noqa: A002
) -> Response:
    """Items most like one item: by content and behaviour (item), by content alone, or by behaviour alone (id)."""
    wanted = json_of(filter, PROBLEMS["PT008"], "the filter")
    if isinstance(wanted, dict) and len(wanted) > MAX_CONDITIONS:
        raise Problem(PROBLEMS["PT008"], f"the filter names more than {MAX_CONDITIONS} attributes")
    parameters = {"item_id": item_id, "k": k, "space": space, "filter": Jsonb(wanted)}
    with request.app.state.metrics.stage("search"):
        async with (
            request.app.state.database.connection() as connection,
            connection.cursor(row_factory=class_row(Neighbour)) as cursor,
        ):
            found = await (await cursor.execute(queries.NEIGHBOURS, parameters)).fetchall()
            generation = found[0].generation if found else await _live(connection)
    items = [{"item_id": n.item_id, "score": n.score, "rank": n.rank} for n in found]
    return _json({"generation": generation, "space": space, "items": items})


@v1.get("/users/{user_id:path}/interests", response_model=InterestsAnswer, tags=["retrieval"])
async def interests(
    request: Request,
    user_id: Annotated[Id, Path(examples=["196"])],
    vectors: Annotated[
        Literal["numbers", "base64"], Query(description="base64: little-endian float32", examples=["base64"])
    ] = "numbers",
) -> Response:
    """The interests stored with the live generation."""
    async with (
        request.app.state.database.connection() as connection,
        connection.cursor(binary=True, row_factory=class_row(Interest)) as cursor,
    ):
        found = await (await cursor.execute(queries.INTERESTS, {"user_id": user_id})).fetchall()
    rows = [
        {"interest": i.interest, "weight": i.weight, "embedding": _vector(i.embedding, vectors), "as_of": i.as_of}
        for i in found
    ]
    return _json({"generation": found[0].generation, "interests": rows})


def _vector(vector: HalfVector, form: Literal["numbers", "base64"]) -> list[float] | str:
    if form == "numbers":
        return list(vector.to_list())
    return b64encode(vector.to_numpy().astype("<f4").tobytes()).decode()


@v1.post("/interactions", response_model=InteractionsAnswer, tags=["data"], responses=CONFLICT)
async def interact(question: InteractionsRequest, request: Request) -> InteractionsAnswer:
    """Takes events, all or none; the next retrieval for these users knows them."""
    with request.app.state.metrics.stage("write"):
        async with request.app.state.database.connection() as connection:
            return await interactions.append(connection, question.interactions)


@v1.post(
    "/features",
    response_model=FeaturesAnswer,
    tags=["data"],
    responses={200: _ARROW},
)
async def features(question: FeaturesRequest, request: Request) -> Response:
    """Features of entities by a feature service; `Accept: application/vnd.apache.arrow.stream` for Arrow."""
    table = await _feature_table(question, request)
    if _wants_arrow(request):
        return Response(as_arrow(table), media_type=ARROW)
    return _json({"rows": list(json_rows(table))})


async def _feature_table(question: FeaturesRequest, request: Request) -> "pa.Table":
    state, entities = request.app.state, dict(question.entities)
    if not question.similarity:
        return await state.features.fetch(question.service, entities)
    rows: pa.Table | dict[str, list[str]] = entities
    async with state.database.snapshot() as connection:
        if question.service is not None:
            rows = await state.features.fetch(question.service, entities, await connection.exported())
        generation = await _live_or_none(connection)
        similar = await state.ranking.similarity(connection, generation, entities["user_id"], entities["item_id"])
    return with_columns(rows, similar)


def _wants_arrow(request: Request) -> bool:
    return ARROW in request.headers.get("accept", "")


@v1.get("/generations", response_model=GenerationsAnswer, tags=["operation"])
async def generations(request: Request) -> Response:
    """All generations, newest first."""
    async with (
        request.app.state.database.connection() as connection,
        connection.cursor(row_factory=dict_row) as cursor,
    ):
        rows = await (await cursor.execute(queries.GENERATIONS)).fetchall()
    return _json({"generations": rows})


@probes.get("/healthz")
async def health() -> Health:
    """The process answers. Says nothing of Postgres."""
    return Health(status="ok")


@probes.get("/readyz", responses=UNREADY)
async def ready(request: Request) -> Ready:
    """503 without Postgres, without the tables, without a live generation, or while `--warm` is loading."""
    if request.app.state.warmer is not None and not request.app.state.warmer.done:
        raise Problem(
            NOT_READY, "torch, the user tower or an encoder is being loaded; questions are answered meanwhile"
        )
    try:
        async with request.app.state.database.connection(timeout=2) as connection:
            return Ready(status="ready", generation=await _live(connection))
    except psycopg.errors.UndefinedTable as error:
        raise Problem(NOT_READY, "the database is not migrated; run `polytower init`") from error


async def _live(connection: Session) -> int:
    generation = await _live_or_none(connection)
    if generation is None:
        raise Problem(PROBLEMS["PT001"], "no generation is live; build one and promote it")
    return generation


async def _live_or_none(connection: Session) -> int | None:
    row = await (await connection.execute(queries.READY)).fetchone()
    return None if row is None else int(row[0])

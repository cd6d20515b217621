"""The endpoints: each borrows a connection, asks one question and writes its answer."""

import asyncio
import json
from base64 import b64encode
from typing import TYPE_CHECKING, Annotated, Any, Literal

import psycopg
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from orjson import Fragment
from pgvector import HalfVector
from psycopg import IsolationLevel
from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from serving import interactions, queries
from serving.content import ContentVector
from serving.database import Session
from serving.errors import NOT_READY, PROBLEMS, Problem, from_postgres
from serving.features import json_rows
from serving.features_endpoint import ARROW, as_arrow, with_columns
from serving.models import (
    MAX_K,
    BatchAnswer,
    BatchRequest,
    FeaturesAnswer,
    FeaturesRequest,
    GenerationsAnswer,
    Health,
    Id,
    InteractionsAnswer,
    InteractionsRequest,
    InterestsAnswer,
    Ready,
    RetrieveAnswer,
    RetrieveRequest,
    SimilarAnswer,
    Space,
)
from serving.openapi import CONFLICT, UNREADY
from serving.queries import Interest, Neighbour
from serving.ranking import Ranked
from serving.retrieval import Answer, Retrieval
from serving.writing import json_bytes

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
        answer = await _answer(question, request)
    except psycopg.Error as error:
        if from_postgres(error).kind is not PROBLEMS["PT013"]:
            raise
        # The generation was dropped under the request: the next one is live.
        answer = await _answer(question, request)
    ranked: Ranked = await request.app.state.ranking.complete(question, answer)
    if _wants_arrow(request):
        return Response(as_arrow(ranked.as_table()), media_type=ARROW)
    return _json(ranked.as_json())


async def _answer(question: RetrieveRequest, request: Request) -> Answer:
    state = request.app.state
    content = await state.content.embed(question) if question.asks_by_content else None
    async with state.database.connection() as connection:
        answer: Answer = await state.retrieval.answer(connection, question, content)
    return answer


@v1.post("/retrieve:batch", response_model=BatchAnswer, tags=["retrieval"])
async def retrieve_batch(batch: BatchRequest, request: Request) -> Response:
    """Several questions over one snapshot, and so one generation; a question that fails leaves the others alone."""
    _charge(request, len(batch.requests) - 1)
    embedded = await asyncio.gather(*(_embedded(question, request) for question in batch.requests))
    answers: list[Answer | Problem] = []
    async with request.app.state.database.connection() as connection:
        await connection.set_isolation_level(IsolationLevel.REPEATABLE_READ)
        try:
            async with connection.transaction():
                for question, content in zip(batch.requests, embedded, strict=True):
                    answers.append(await _one_of_batch(request.app.state.retrieval, connection, question, content))
        finally:
            if not connection.closed:
                await connection.set_isolation_level(None)
    # After the snapshot: what features and similarities read is theirs to choose, and no connection waits for it.
    return _json({"answers": [await _completed(request, *pair) for pair in zip(batch.requests, answers, strict=True)]})


async def _completed(
    request: Request, question: RetrieveRequest, answer: Answer | Problem
) -> Fragment | dict[str, Any]:
    try:
        if isinstance(answer, Problem):
            return answer.as_json()
        ranked: Ranked = await request.app.state.ranking.complete(question, answer)
        return Fragment(ranked.as_json())
    except Problem as problem:
        return problem.as_json()


def _charge(request: Request, further: int) -> None:
    """A batch counts as many requests as it holds against the key's rate."""
    key = getattr(request.state, "key", None)
    if key is not None:
        request.app.state.ring.charge(key, further)


async def _embedded(question: RetrieveRequest, request: Request) -> ContentVector | Problem | None:
    """What a question by content is embedded as, or the problem with it."""
    if not question.asks_by_content:
        return None
    try:
        vector: ContentVector = await request.app.state.content.embed(question)
    except Problem as problem:
        return problem
    return vector


async def _one_of_batch(
    retrieval: Retrieval, connection: Session, question: RetrieveRequest, content: ContentVector | Problem | None
) -> Answer | Problem:
    try:
        if isinstance(content, Problem):
            raise content
        if content is not None and content.generation != await _live(connection):
            raise Problem(PROBLEMS["PT013"], "another generation went live while the question was read; try again")
        async with connection.transaction():
            return await retrieval.answer(connection, question, content)
    except Problem as refusal:
        return refusal
    except psycopg.Error as error:
        problem = from_postgres(error)
        if problem.kind.status >= 500:
            raise
        return problem


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
    try:
        wanted = json.loads(filter)
    except ValueError as error:
        raise Problem(PROBLEMS["PT008"], "the filter is not JSON") from error
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
    entities, table = dict(question.entities), None
    if question.service is not None:
        table = await request.app.state.features.fetch(question.service, entities)
    if question.similarity:
        similar = await request.app.state.ranking.similarity(entities["user_id"], entities["item_id"])
        table = with_columns(entities if table is None else table, similar)
    return table


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
    row = await (await connection.execute(queries.READY)).fetchone()
    if row is None:
        raise Problem(PROBLEMS["PT001"], "no generation is live; build one and promote it")
    return int(row[0])

"""The endpoints: each borrows a connection, asks one question and writes its answer."""

import json
from typing import Annotated, Any

import psycopg
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from psycopg import IsolationLevel
from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb
from pydantic_core import to_json

from serving import interactions, queries
from serving.errors import NOT_READY, PROBLEMS, Problem, from_postgres
from serving.features import json_rows
from serving.features_endpoint import ARROW, as_arrow
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
from serving.queries import Candidate, Interest, Neighbour
from serving.retrieval import Answer, Connection, Retrieval

probes = APIRouter(tags=["operation"])
v1 = APIRouter(prefix="/v1")


def _json(content: Any) -> Response:
    # Written straight from rows: validating a thousand candidates on the way out costs more than finding them.
    return Response(to_json(content, inf_nan_mode="null"), media_type="application/json")


@v1.post("/retrieve", response_model=RetrieveAnswer, tags=["retrieval"])
async def retrieve(question: RetrieveRequest, request: Request) -> Response:
    """Candidates for a user, a raw history or given vectors, filtered before the cut, merged over interests."""
    retrieval: Retrieval = request.app.state.retrieval
    async with request.app.state.database.connection() as connection:
        try:
            answer = await retrieval.answer(connection, question)
        except psycopg.Error as error:
            if from_postgres(error).kind is not PROBLEMS["PT013"]:
                raise
            # The generation was dropped under the request: the next one is live.
            answer = await retrieval.answer(connection, question)
    return _json(_retrieved(answer, question))


@v1.post("/retrieve:batch", response_model=BatchAnswer, tags=["retrieval"])
async def retrieve_batch(batch: BatchRequest, request: Request) -> Response:
    """Several questions over one snapshot, and so one generation; a question that fails leaves the others alone."""
    answers = []
    async with request.app.state.database.connection() as connection:
        await connection.set_isolation_level(IsolationLevel.REPEATABLE_READ)
        try:
            async with connection.transaction():
                for question in batch.requests:
                    answers.append(await _one_of_batch(request.app.state.retrieval, connection, question))
        finally:
            if not connection.closed:
                await connection.set_isolation_level(None)
    return _json({"answers": answers})


async def _one_of_batch(retrieval: Retrieval, connection: Connection, question: RetrieveRequest) -> dict[str, Any]:
    try:
        async with connection.transaction():
            return _retrieved(await retrieval.answer(connection, question), question)
    except Problem as error:
        return error.as_json()
    except psycopg.Error as error:
        problem = from_postgres(error)
        if problem.kind.status >= 500:
            raise
        return problem.as_json()


def _retrieved(answer: Answer, question: RetrieveRequest) -> dict[str, Any]:
    titled = "title" in question.fields
    return {
        "generation": answer.generation,
        "interests": answer.interests,
        "candidates": [_candidate(candidate, titled) for candidate in answer.candidates],
        "skipped": answer.skipped,
        "degraded": answer.degraded,
    }


def _candidate(candidate: Candidate, titled: bool) -> dict[str, Any]:
    content = {
        "item_id": candidate.item_id,
        "score": candidate.score,
        "rank": candidate.rank,
        "interest": candidate.interest,
        "interest_rank": candidate.interest_rank,
        "found_by": [
            {"interest": interest, "rank": rank, "score": score}
            for interest, rank, score in zip(
                candidate.found_by, candidate.found_ranks, candidate.found_scores, strict=True
            )
        ],
    }
    return {**content, "title": candidate.title} if titled else content


@v1.get("/items/{item_id}/similar", response_model=SimilarAnswer, tags=["retrieval"])
async def similar(
    request: Request,
    item_id: Annotated[Id, Path()],
    k: Annotated[int, Query(ge=1, le=MAX_K)] = 10,
    space: Space = "item",
    filter: Annotated[str, Query(description="JSON, as in /retrieve", max_length=10_000)] = "{}",  # noqa: A002
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


@v1.get("/users/{user_id}/interests", response_model=InterestsAnswer, tags=["retrieval"])
async def interests(request: Request, user_id: Annotated[Id, Path()]) -> Response:
    """The interests stored with the live generation."""
    async with (
        request.app.state.database.connection() as connection,
        connection.cursor(binary=True, row_factory=class_row(Interest)) as cursor,
    ):
        found = await (await cursor.execute(queries.INTERESTS, {"user_id": user_id})).fetchall()
    rows = [
        {"interest": i.interest, "weight": i.weight, "embedding": i.embedding.to_list(), "as_of": i.as_of}
        for i in found
    ]
    return _json({"generation": found[0].generation, "interests": rows})


@v1.post("/interactions", response_model=InteractionsAnswer, tags=["data"])
async def interact(question: InteractionsRequest, request: Request) -> InteractionsAnswer:
    """Takes events, all or none; the next retrieval for these users knows them."""
    with request.app.state.metrics.stage("write"):
        async with request.app.state.database.connection() as connection:
            return await interactions.append(connection, question.interactions)


@v1.post(
    "/features",
    response_model=FeaturesAnswer,
    tags=["data"],
    responses={200: {"content": {ARROW: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def features(question: FeaturesRequest, request: Request) -> Response:
    """Features of entities by a feature service; `Accept: application/vnd.apache.arrow.stream` for Arrow."""
    table = await request.app.state.features.fetch(question.service, dict(question.entities))
    if ARROW in request.headers.get("accept", ""):
        return Response(as_arrow(table), media_type=ARROW)
    return _json({"rows": list(json_rows(table))})


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


@probes.get("/readyz")
async def ready(request: Request) -> Ready:
    """503 without Postgres, without the tables, or without a live generation."""
    try:
        async with request.app.state.database.connection(timeout=2) as connection:
            return Ready(status="ready", generation=await _live(connection))
    except psycopg.errors.UndefinedTable as error:
        raise Problem(NOT_READY, "the database is not migrated; run `polytower init`") from error


async def _live(connection: Connection) -> int:
    row = await (await connection.execute(queries.READY)).fetchone()
    if row is None:
        raise Problem(PROBLEMS["PT001"], "no generation is live; build one and promote it")
    return int(row[0])

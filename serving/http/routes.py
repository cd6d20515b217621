"""The endpoints: each borrows a connection, asks one question and writes its answer."""

from base64 import b64encode
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import psycopg
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from orjson import Fragment
from pgvector import HalfVector
from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from serving import queries
from serving.answering import answer, answer_batch
from serving.errors import NOT_READY, PROBLEMS, Problem
from serving.field_types import MAX_K, Id
from serving.http import interactions
from serving.http.openapi import CONFLICT, UNREADY
from serving.http.reading import json_of
from serving.json_columns import json_bytes
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
from serving.question import MAX_CONDITIONS, Space
from serving.rank.feature_service import ARROW, as_arrow, with_columns
from serving.rank.features import json_rows
from serving.retrieve.live import live, live_or_none
from serving.services import Services

if TYPE_CHECKING:
    import pyarrow as pa

probes = APIRouter(tags=["operation"])
v1 = APIRouter(prefix="/v1")


def _json(content: Any) -> Response:
    # Written straight from rows: validating a thousand candidates on the way out costs more than finding them.
    written = content if isinstance(content, bytes) else json_bytes(content)
    return Response(written, media_type="application/json")


def services_of(request: Request) -> Services:
    """The server's parts, which create_app made."""
    services: Services = request.app.state.services
    return services


_ARROW = {"content": {ARROW: {"schema": {"type": "string", "format": "binary"}}}}


@v1.post("/retrieve", response_model=RetrieveAnswer, tags=["retrieval"], responses={200: _ARROW, **CONFLICT})
async def retrieve(question: RetrieveRequest, request: Request) -> Response:
    """Candidates for a user, a raw history, given vectors, a text or a picture; filtered before the cut, merged."""
    ranked = await answer(services_of(request), question)
    if _wants_arrow(request):
        return Response(as_arrow(ranked.as_table()), media_type=ARROW)
    return _json(ranked.as_json())


@v1.post("/retrieve:batch", response_model=BatchAnswer, tags=["retrieval"])
async def retrieve_batch(batch: BatchRequest, request: Request) -> Response:
    """Several questions over one snapshot, and so one generation; a question that fails leaves the others alone."""
    _charge(request, len(batch.requests) - 1)
    found = await answer_batch(services_of(request), batch.requests)
    answers = [each.as_json() if isinstance(each, Problem) else Fragment(each.as_json()) for each in found]
    return _json({"answers": answers})


def _charge(request: Request, further: int) -> None:
    """A batch counts as many requests as it holds against the key's rate."""
    charge: Callable[[int], None] | None = getattr(request.state, "charge", None)
    if charge is not None:
        charge(further)


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
    """Items most like one item: by content and behaviour (item), one of them (content, id), or as encoders see them."""
    wanted = json_of(filter, PROBLEMS["PT008"], "the filter")
    if isinstance(wanted, dict) and len(wanted) > MAX_CONDITIONS:
        raise Problem(PROBLEMS["PT008"], f"the filter names more than {MAX_CONDITIONS} attributes")
    parameters = {"item_id": item_id, "k": k, "space": space, "filter": Jsonb(wanted)}
    services = services_of(request)
    with services.metrics.stage("search"):
        async with (
            services.database.connection() as connection,
            connection.cursor(row_factory=class_row(Neighbour)) as cursor,
        ):
            found = await (await cursor.execute(queries.NEIGHBOURS, parameters)).fetchall()
            generation = found[0].generation if found else await live(connection)
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
        services_of(request).database.connection() as connection,
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
    services = services_of(request)
    with services.metrics.stage("write"):
        async with services.database.connection() as connection:
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
    services, entities = services_of(request), dict(question.entities)
    if not question.of_pairs:
        assert question.service is not None
        return await services.features.fetch(question.service, entities)
    rows: pa.Table | dict[str, list[str]] = entities
    async with services.database.snapshot() as connection:
        if question.service is not None:
            rows = await services.features.fetch(question.service, entities, await connection.exported())
        users, items = entities["user_id"], entities["item_id"]
        if question.similarity:
            generation = await live_or_none(connection)
            rows = with_columns(rows, await services.ranking.similarity(connection, generation, users, items))
        if question.relevant is not None:
            rows = with_columns(rows, await services.ranking.relevant(connection, users, items, question.relevant))
    assert not isinstance(rows, dict)
    return rows


def _wants_arrow(request: Request) -> bool:
    return ARROW in request.headers.get("accept", "")


@v1.get("/generations", response_model=GenerationsAnswer, tags=["operation"])
async def generations(request: Request) -> Response:
    """All generations, newest first."""
    async with (
        services_of(request).database.connection() as connection,
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
    services = services_of(request)
    if services.warmer is not None and not services.warmer.done:
        raise Problem(
            NOT_READY, "torch, the user tower or an encoder is being loaded; questions are answered meanwhile"
        )
    try:
        async with services.database.connection(timeout=2) as connection:
            return Ready(status="ready", generation=await live(connection))
    except psycopg.errors.UndefinedTable as error:
        raise Problem(NOT_READY, "the database is not migrated; run `polytower init`") from error

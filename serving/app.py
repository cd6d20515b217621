"""The HTTP API: parse, ask, answer. Every error is a problem response; only the pool outlives a request."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psycopg
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from polytower.postgres import server_url
from polytower.settings import settings
from serving import routes
from serving.content import ContentQueries
from serving.database import Database
from serving.errors import INTERNAL, INVALID, MEDIA_TYPE, Kind, Problem, from_postgres
from serving.features_endpoint import Features
from serving.guard import Guard, KeyRing
from serving.indexes import Indexes
from serving.limits import Limits
from serving.loading import Loader
from serving.metrics import CONTENT_TYPE, Metrics
from serving.models import FeaturesRequest, RetrieveRequest
from serving.online import UserTowers
from serving.openapi import METRICS, PROBLEMS, Api
from serving.ranking import Ranking
from serving.retrieval import Retrieval
from serving.shadow import Shadow
from serving.straight import HotRoute, Straight
from serving.warm import warmer
from serving.writing import json_bytes

LOG = logging.getLogger(__name__)
# What a request may fail with; anything else is the server's own failure, and goes to its log.
EXPECTED = (Problem, psycopg.Error, RequestValidationError, HTTPException)
HOT = (
    HotRoute("/v1/retrieve", RetrieveRequest, routes.retrieve),
    HotRoute("/v1/features", FeaturesRequest, routes.features),
)


@dataclass(frozen=True)
class Caps:
    """Limits of one server.

    body: bytes; concurrency: requests in flight; deadline: seconds; pool: connections. patience: seconds that a
    question waits for torch or an encoder, before it is answered from what is stored or told to come back.
    """

    body: int = 1_000_000
    concurrency: int = 64
    deadline: float = 10.0
    pool: int = 8
    patience: float = 0.0


def create_app(
    url: str | None = None, *, caps: Caps | None = None, require_keys: bool | None = None, warm: bool = False
) -> FastAPI:
    """The application over a migrated database; url None means the platform's own.

    require_keys: whether requests need an API key; None: what POLYTOWER_REQUIRE_KEYS says, else no. warm: whether
    torch, the user tower and the encoders are loaded from the start on (/readyz waits for them), else from the first
    request that needs one. Starts (and answers /healthz) without Postgres; Feast is never imported.
    """
    caps = caps or Caps()
    guarded = bool(settings().require_keys) if require_keys is None else require_keys
    metrics = Metrics()
    where = url or server_url()
    loader = Loader(patience=caps.patience)
    towers = UserTowers(metrics, loader)
    database = Database(where, metrics, size=caps.pool, timeout=caps.deadline * 0.8)
    features = Features(where, metrics, timeout=caps.deadline * 0.8)
    ring = KeyRing(database)
    content = ContentQueries(database, metrics, loader)
    indexes = Indexes(where, metrics, limit=settings().index_mb << 20, threads=settings().search_threads)
    shadow = Shadow(database, metrics)
    retrieval = Retrieval(towers, metrics, indexes, shadow)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await database.open()
        features.open()
        indexes.refresh()
        warming = None if app.state.warmer is None else asyncio.create_task(app.state.warmer.run())
        yield
        if warming is not None:
            warming.cancel()
        if guarded:
            await _note_use(ring)
        await shadow.settled()
        await indexes.close()
        await database.close()
        towers.close()
        content.close()
        loader.close()
        features.close()

    respond = _responder(metrics)

    def around(inner: ASGIApp) -> ASGIApp:
        straight = Straight(inner, HOT, expected=EXPECTED, respond=respond)
        limits = Limits(straight, metrics, body=caps.body, concurrency=caps.concurrency, deadline=caps.deadline)
        # Who has no key takes no place in the queue.
        return Guard(limits, ring, metrics) if guarded else limits

    app = Api(guarded=guarded, around=around, lifespan=lifespan)
    app.state.database = database
    app.state.retrieval = retrieval
    app.state.content = content
    app.state.features = features
    app.state.ranking = Ranking(database, features, metrics)
    app.state.indexes = indexes
    app.state.metrics = metrics
    app.state.warmer = warmer(database, retrieval, content, loader) if warm else None
    app.state.ring = ring
    app.include_router(routes.probes)
    app.include_router(routes.v1, responses=PROBLEMS)

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse, responses={200: METRICS})
    async def prometheus() -> Response:
        """Prometheus metrics of this process."""
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)

    _handle_errors(app, respond)
    return app


async def _note_use(ring: KeyRing) -> None:
    try:
        await ring.note_use()
    except (psycopg.Error, Problem) as error:
        LOG.warning("when API keys were last used could not be written: %s", error)


def _problem_of(error: Exception) -> Problem:
    match error:
        case Problem():
            return error
        case psycopg.Error():
            return from_postgres(error)
        case RequestValidationError():
            # What was sent is not sent back: it may be large, or not JSON at all.
            errors = [{"where": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()[:20]]
            first = errors[0] if errors else {"where": "body", "message": "cannot be read"}
            return Problem(INVALID, f"{first['where']}: {first['message']}", {"errors": errors})
        case HTTPException(status_code=400):  # a body that is not JSON at all
            return Problem(INVALID, f"body: {error.detail}")
        case HTTPException():
            slug = str(error.detail).lower().replace(" ", "-")
            return Problem(Kind(error.status_code, slug, str(error.detail)), "see /docs for what there is to ask")
    return Problem(INTERNAL, "the failure is in the server's log")


def _responder(metrics: Metrics) -> Callable[[Exception], Response]:
    def respond(error: Exception) -> Response:
        problem = _problem_of(error)
        metrics.problem(problem.kind.slug)
        named = error.headers if isinstance(error, HTTPException) else None  # 405 names the methods that are allowed
        return Response(
            json_bytes(problem.as_json()), problem.kind.status, {**problem.headers, **(named or {})}, MEDIA_TYPE
        )

    return respond


def _handle_errors(app: FastAPI, respond: Callable[[Exception], Response]) -> None:
    async def handle(_request: Request, error: Exception) -> Response:
        return respond(error)

    for kind in (*EXPECTED, Exception):
        app.add_exception_handler(kind, handle)

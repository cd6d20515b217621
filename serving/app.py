"""The HTTP API: parse, ask, answer. Every error is a problem response; only the pool outlives a request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from polytower.postgres import database_url
from serving import routes
from serving.database import Database
from serving.errors import INTERNAL, INVALID, MEDIA_TYPE, Kind, Problem, from_postgres
from serving.features_endpoint import Features
from serving.limits import Limits
from serving.metrics import CONTENT_TYPE, Metrics
from serving.models import ProblemModel
from serving.online import UserTowers
from serving.retrieval import Retrieval

DESCRIPTION = """
Candidates for users, items near items, features for rankers. Candidates carry the interest that found them, and the
generation that they come from. SQL gives the same answers: `select * from polytower.retrieve('196', 10)`.
"""


@dataclass(frozen=True)
class Caps:
    """Limits of one server. body: bytes; concurrency: requests in flight; deadline: seconds; pool: connections."""

    body: int = 1_000_000
    concurrency: int = 64
    deadline: float = 10.0
    pool: int = 8


def create_app(url: str | None = None, *, caps: Caps | None = None) -> FastAPI:
    """The application over a migrated database; url None means the platform's own.

    Starts (and answers /healthz) without Postgres; torch is imported when a request first needs it, Feast never.
    """
    caps = caps or Caps()
    metrics = Metrics()
    where = url or database_url()
    towers = UserTowers()
    database = Database(where, metrics, size=caps.pool, timeout=caps.deadline * 0.8)
    features = Features(where, metrics, timeout=caps.deadline * 0.8)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await database.open()
        features.open()
        yield
        await database.close()
        towers.close()
        features.close()

    app = FastAPI(title="polytower", version="1", description=DESCRIPTION, lifespan=lifespan)
    app.state.database = database
    app.state.retrieval = Retrieval(towers, metrics)
    app.state.features = features
    app.state.metrics = metrics
    app.include_router(routes.probes)
    app.include_router(routes.v1, responses=_documented())

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def prometheus() -> Response:
        """Prometheus metrics of this process."""
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)

    _handle_errors(app, metrics)
    app.add_middleware(
        Limits,
        metrics=metrics,
        body=caps.body,
        concurrency=caps.concurrency,
        deadline=caps.deadline,
    )
    return app


def _documented() -> dict[int | str, dict[str, Any]]:
    """The problem responses that every endpoint of /v1 can give."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemModel"}}}
    return {
        status: {"model": ProblemModel, "description": description, "content": content}
        for status, description in {
            404: "Unknown user, item or service",
            413: "The body is too large",
            422: "The request is not valid",
            429: "Too many requests are waiting; see Retry-After",
            503: "Postgres, a live generation or an answer in time is missing; see Retry-After",
        }.items()
    }


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    def respond(problem: Problem) -> Response:
        metrics.problem(problem.kind.slug)
        return Response(to_json(problem.as_json()), problem.kind.status, problem.headers, MEDIA_TYPE)

    @app.exception_handler(Problem)
    async def _problem(_request: Request, error: Problem) -> Response:
        return respond(error)

    @app.exception_handler(psycopg.Error)
    async def _postgres(_request: Request, error: psycopg.Error) -> Response:
        return respond(from_postgres(error))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> Response:
        # What was sent is not sent back: it may be large, or not JSON at all.
        errors = [{"where": ".".join(map(str, e["loc"])), "message": e["msg"]} for e in error.errors()[:20]]
        first = errors[0] if errors else {"where": "body", "message": "cannot be read"}
        return respond(Problem(INVALID, f"{first['where']}: {first['message']}", {"errors": errors}))

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, error: HTTPException) -> Response:
        slug = str(error.detail).lower().replace(" ", "-")
        return respond(Problem(Kind(error.status_code, slug, str(error.detail)), "see /docs for what there is to ask"))

    @app.exception_handler(Exception)
    async def _failed(_request: Request, _error: Exception) -> Response:
        return respond(Problem(INTERNAL, "the failure is in the server's log"))

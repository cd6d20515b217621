"""The HTTP API: parse, ask, answer. Every error is a problem response; only the pool outlives a request."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from polytower.postgres import server_url
from polytower.settings import settings
from serving.http import routes
from serving.http.guard import Guard, KeyRing
from serving.http.hot_routes import HotRoute, HotRoutes
from serving.http.limits import Limits
from serving.http.openapi import METRICS, PROBLEMS, Api
from serving.http.pages import add_pages
from serving.http.respond import EXPECTED, respond
from serving.metrics import CONTENT_TYPE
from serving.models import FeaturesRequest, RetrieveRequest
from serving.services import make_services

LOG = logging.getLogger(__name__)
HOT = (
    HotRoute("/v1/retrieve", RetrieveRequest, routes.retrieve),
    HotRoute("/v1/features", FeaturesRequest, routes.features),
)


@dataclass(frozen=True)
class Caps:
    """Limits of one server.

    body: bytes; reading: seconds for it to arrive; concurrency: requests that are answered at once; per_client: those
    of one client, so that nobody takes all places; deadline: seconds; pool: connections. patience: seconds that a
    question waits for torch or an encoder, before it is answered from what is stored or told to come back.
    """

    body: int = 1_000_000
    reading: float = 5.0
    concurrency: int = 64
    per_client: int = 48
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
    services = make_services(
        url or server_url(), pool=caps.pool, timeout=caps.deadline * 0.8, patience=caps.patience, warm=warm
    )
    metrics, ring = services.metrics, KeyRing(services.database)
    answered = partial(respond, metrics=metrics)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with services.running():
            services.features.open()
            yield
            if guarded:
                await ring.note_use()

    def around(inner: ASGIApp) -> ASGIApp:
        return Limits(
            HotRoutes(inner, HOT, respond=answered), metrics,
            body=caps.body, concurrency=caps.concurrency, deadline=caps.deadline, per_client=caps.per_client,
            reading=caps.reading, admit=Guard(ring, metrics).admit if guarded else None,
        )  # fmt: skip

    app = Api(guarded=guarded, around=around, lifespan=lifespan)
    app.state.services = services
    app.include_router(routes.probes)
    app.include_router(routes.v1, responses=PROBLEMS)

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse, responses={200: METRICS})
    async def prometheus() -> Response:
        """Prometheus metrics of this process."""
        return Response(metrics.exposition(), media_type=CONTENT_TYPE)

    add_pages(app)
    _handle_errors(app, answered)
    return app


def _handle_errors(app: FastAPI, respond: Callable[[Exception], Response]) -> None:
    async def handle(_request: Request, error: Exception) -> Response:
        return respond(error)

    for kind in (*EXPECTED, Exception):
        app.add_exception_handler(kind, handle)

"""Hot routes past FastAPI: same function, same model, same problems, a tenth of the way. Plain ASGI.

FastAPI documents the routes, and answers their other methods. What it does for every request (two exit stacks, a search
through the routes, solving dependencies that are not there) takes as long as finding the candidates.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import INVALID, Problem
from serving.http.reading import json_of


@dataclass(frozen=True)
class HotRoute:
    """A POST to `path_format` goes to `endpoint`, with the body read as `model`."""

    path_format: str  # the name under which routes are measured
    model: type[BaseModel]
    endpoint: Callable[[Any, Request], Awaitable[Response]]


class HotRoutes:
    """Wraps the application. respond: the response to an error."""

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[HotRoute],
        *,
        respond: Callable[[Exception], Response],
    ) -> None:
        self.app = app
        self.routes = {route.path_format: route for route in routes}
        self.respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Everything else goes on to the application."""
        route = self.routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive)
        try:
            response = await route.endpoint(await _question(route.model, request), request)
        except Exception as error:
            response = self.respond(error)
        await response(scope, receive, send)


async def _question(model: type[BaseModel], request: Request) -> BaseModel:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Problem(INVALID, "body: is not declared as JSON; send it with content-type: application/json")
    try:
        return model.model_validate(json_of(await request.body(), INVALID, "body"))
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from error

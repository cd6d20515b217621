"""One hot route past FastAPI: same function, same model, same problems, a tenth of the way. Plain ASGI.

FastAPI documents the route, and answers its other methods. What it does for every request (two exit stacks, a search
through the routes, solving dependencies that are not there) takes as long as finding the candidates.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import INVALID, Problem

LOG = logging.getLogger(__name__)


class Straight:
    """Wraps the application: a POST to `path` goes to `endpoint` at once.

    model: of the body. respond: the response to an error; one that is not expected is the server's own failure.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        path: str,
        model: type[BaseModel],
        endpoint: Callable[[Any, Request], Awaitable[Response]],
        expected: tuple[type[Exception], ...],
        respond: Callable[[Exception], Response],
    ) -> None:
        self.app = app
        self.path_format = path  # the name under which routes are measured
        self.model = model
        self.endpoint = endpoint
        self.expected = expected
        self.respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Everything else goes on to the application."""
        if scope["type"] != "http" or scope["path"] != self.path_format or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        scope["route"] = self
        request = Request(scope, receive)
        try:
            response = await self.endpoint(await self._question(request), request)
        except self.expected as error:
            response = self.respond(error)
        except Exception as error:
            LOG.exception("POST %s failed", self.path_format)
            response = self.respond(error)
        await response(scope, receive, send)

    async def _question(self, request: Request) -> BaseModel:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise Problem(INVALID, "body: is not declared as JSON; send it with content-type: application/json")
        try:
            return self.model.model_validate(json.loads(await request.body()))
        except ValidationError as error:
            faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
            raise RequestValidationError(faults) from error
        except (ValueError, RecursionError) as error:
            raise Problem(INVALID, f"body: is not JSON: {error}") from error

"""The OpenAPI document: what FastAPI derives from the code, and the problems and keys that lie outside of it."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from serving.errors import MEDIA_TYPE
from serving.http.guard import scope_of
from serving.models import ProblemModel

DESCRIPTION = """
Candidates for users, items near items, features for rankers. Candidates carry the interest that found them, and the
generation that they come from. SQL gives the same answers: `select * from polytower.retrieve('196', 10)`.
"""

_CONTENT = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemModel"}}}

# What every endpoint of /v1 can answer.
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemModel, "description": description, "content": _CONTENT}
    for status, description in {
        404: "Unknown user, item or service",
        408: "The body did not arrive in time",
        413: "The body is too large",
        422: "The request is not valid",
        429: "Too many requests are waiting, or come from this client; see Retry-After",
        503: "Postgres, a live generation or an answer in time is missing; see Retry-After",
    }.items()
}

# What some of them can answer beside these.
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ProblemModel, "description": "It does not fit what is stored", "content": _CONTENT}
}
UNREADY: dict[int | str, dict[str, Any]] = {
    503: {
        "model": ProblemModel,
        "description": "Postgres, the tables or a live generation is missing, or the server is still loading",
        "content": _CONTENT,
    }
}

METRICS: dict[str, Any] = {
    "content": {"text/plain": {"example": 'polytower_request_seconds_count{route="/v1/retrieve",status="200"} 7.0\n'}}
}

# What all can answer where keys are required.
REFUSALS = {
    "401": {"description": "No key, or an unknown or revoked one", "content": _CONTENT},
    "403": {"description": "The key lacks the scope", "content": _CONTENT},
}


class Api(FastAPI):
    """guarded: whether requests need a key; the document then says so, with the scope of each operation.

    around: what every request passes first. Not FastAPI's middleware, which puts three layers of its own outside.
    """

    def __init__(self, *, guarded: bool, around: Callable[[ASGIApp], ASGIApp], **options: Any) -> None:
        super().__init__(
            title="polytower", version="1", description=DESCRIPTION, docs_url=None, redoc_url=None, **options
        )
        self.guarded = guarded
        self.around = around

    def build_middleware_stack(self) -> ASGIApp:
        """The application as it is called."""
        return self.around(super().build_middleware_stack())

    def openapi(self) -> dict[str, Any]:
        """The document; made when it is first asked for."""
        if self.openapi_schema is None:
            document = super().openapi()
            if self.guarded:
                _add_keys(document)
        assert self.openapi_schema is not None
        return self.openapi_schema


def _add_keys(document: dict[str, Any]) -> None:
    scheme = {"type": "http", "scheme": "bearer", "description": "`polytower keys create NAME --scope read` makes one"}
    document["components"]["securitySchemes"] = {"key": scheme}
    for path, operations in document["paths"].items():
        scope = scope_of(path)
        if scope is None:
            continue
        for operation in operations.values():
            operation["security"] = [{"key": [scope]}]
            operation["responses"] |= REFUSALS

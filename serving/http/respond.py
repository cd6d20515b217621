"""Errors as responses: one problem document each, with the request's id. The server's own failures go to its log."""

import json
import logging

import psycopg
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Send

from serving.errors import INTERNAL, INVALID, MEDIA_TYPE, REQUEST_ID, Kind, Problem, from_postgres
from serving.json_columns import json_bytes
from serving.metrics import ServerMetrics

LOG = logging.getLogger(__name__)
# What a request may fail with; anything else is the server's own failure.
EXPECTED = (Problem, psycopg.Error, RequestValidationError, HTTPException)


def problem_of(error: Exception) -> Problem:
    """The problem that an error stands for. Every 500 is logged here, under the request's id."""
    problem = _problem_of(error)
    if problem.kind.status == INTERNAL.status:
        LOG.error("request %s failed", REQUEST_ID.get(), exc_info=error)
    return problem


def respond(error: Exception, metrics: ServerMetrics) -> Response:
    """The response to an error, counted."""
    problem = problem_of(error)
    metrics.problem(problem.kind.slug)
    named = error.headers if isinstance(error, HTTPException) else None  # 405 names the methods that are allowed
    headers = {**problem.headers, **(named or {})}
    return Response(json_bytes(problem.as_json()), problem.kind.status, headers, MEDIA_TYPE)


async def send_problem(send: Send, problem: Problem, metrics: ServerMetrics) -> None:
    """The same where there is no application around: plain ASGI."""
    metrics.problem(problem.kind.slug)
    headers = {"content-type": MEDIA_TYPE, **problem.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.kind.status, "headers": encoded})
    await send({"type": "http.response.body", "body": json.dumps(problem.as_json()).encode()})


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
    return Problem(INTERNAL, "the failure is in the server's log, under the id of this request")

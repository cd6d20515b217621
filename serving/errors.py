"""What can go wrong with a question, once for SQL and HTTP: SQLSTATE → problem type and status (RFC 9457)."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import psycopg

from polytower.errors import UserError

MEDIA_TYPE = "application/problem+json"
# Of the request that is being answered: in its problem document, its response's headers and the server's log.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")


@dataclass(frozen=True, slots=True)
class Kind:
    """A problem type: HTTP status, last part of its type URI, title."""

    status: int
    slug: str
    title: str


# The SQLSTATEs that migrations/sql raises.
PROBLEMS = {
    "PT001": Kind(503, "no-live-generation", "No generation is live"),
    "PT002": Kind(404, "unknown-user", "Unknown user"),
    "PT003": Kind(404, "unknown-item", "Unknown item"),
    "PT004": Kind(422, "k-out-of-range", "k is out of range"),
    "PT005": Kind(422, "wrong-dimension", "Vectors do not fit the generation"),
    "PT006": Kind(422, "weights-not-usable", "Weights are not usable"),
    "PT007": Kind(422, "unknown-attribute", "Unknown attribute in the filter"),
    "PT008": Kind(422, "malformed-filter", "Malformed filter"),
    "PT009": Kind(422, "unknown-space", "Unknown space"),
    "PT010": Kind(422, "unknown-merge", "Unknown merge"),
    "PT011": Kind(404, "no-embedding", "The item has no embedding in this space"),
    "PT012": Kind(404, "no-interests", "The user has no interests"),
    "PT013": Kind(503, "generation-gone", "The generation is no longer served"),
    "PT014": Kind(422, "malformed-diversity", "Malformed diversity"),
}

# What only HTTP can meet.
INVALID = Kind(422, "invalid-request", "The request is not valid")
UNREADABLE = Kind(422, "unreadable-value", "A value cannot be read")
TOO_COMPLEX = Kind(422, "too-complex", "The question is too complex")
UNKNOWN_HISTORY = Kind(422, "unknown-history", "No item of the history is known")
UNKNOWN_ITEMS = Kind(422, "unknown-items", "Interactions name items that were never loaded")
EVENT_CONFLICT = Kind(409, "event-conflict", "An event id stands for another event")
NO_TOWER = Kind(503, "no-user-tower", "The generation brings no user tower")
NO_CONTENT = Kind(422, "no-such-content", "The generation was not built from such content")
NO_CONTENT_TOWER = Kind(409, "no-content-tower", "The generation brings no content tower")
NO_QUERIES = Kind(409, "no-personalised-search", "The generation's towers read no queries")
NO_ENCODER = Kind(503, "no-encoder", "The encoder cannot be loaded")
LOADING = Kind(503, "loading", "What answers this is being loaded")
ENCODER_MISMATCH = Kind(409, "encoder-mismatch", "Another encoder filled the generation")
UNREADABLE_IMAGE = Kind(422, "unreadable-image", "The picture cannot be read")
UNKNOWN_SERVICE = Kind(404, "unknown-service", "Unknown feature service")
UNUSABLE_FEATURES = Kind(422, "unusable-entities", "The feature service cannot answer for these entities")
NO_KEY = Kind(401, "missing-key", "An API key is needed")
UNKNOWN_KEY = Kind(401, "unknown-key", "The API key is not valid")
NO_SCOPE = Kind(403, "insufficient-scope", "The API key does not allow this")
RATE_LIMITED = Kind(429, "rate-limited", "Asked too often")
TOO_LARGE = Kind(413, "body-too-large", "The body is too large")
TOO_LATE = Kind(408, "body-too-slow", "The body did not arrive in time")
TOO_MANY = Kind(429, "too-many-requests", "Too many requests are waiting")
TOO_SLOW = Kind(503, "deadline-exceeded", "The answer took too long")
NO_DATABASE = Kind(503, "no-database", "Postgres does not answer")
READ_ONLY = Kind(503, "read-only", "The database takes no events at present")
NOT_READY = Kind(503, "not-ready", "The server is not ready")
INTERNAL = Kind(500, "internal-error", "The server failed")


@dataclass(eq=False)  # not frozen: raising sets the traceback
class Problem(Exception):  # noqa: N818 the name that RFC 9457 gives it
    """One problem response.

    detail: what is wrong, where, and the way out. extra: members beside the standard ones. retry_after: seconds after
    which to come back, told with 429 and 503.
    """

    kind: Kind
    detail: str
    extra: dict[str, Any] = field(default_factory=dict)
    retry_after: int = 1

    def __str__(self) -> str:
        """For logs."""
        return self.detail

    @property
    def headers(self) -> dict[str, str]:
        """429 and 503 pass: they say when to come back. 401 says how to identify oneself."""
        if self.kind.status == 401:
            return {"WWW-Authenticate": 'Bearer realm="polytower"'}
        if self.kind.status == 408:  # what comes after it on this connection would be the rest of the body
            return {"Connection": "close"}
        return {"Retry-After": str(self.retry_after)} if self.kind.status in (429, 503) else {}

    def as_json(self) -> dict[str, Any]:
        """The response's body."""
        return {
            "type": f"/problems/{self.kind.slug}",
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.detail,
            "request_id": REQUEST_ID.get(),
            **self.extra,
        }


def from_postgres(error: psycopg.Error) -> Problem:
    """The problem that a database error stands for; nothing of the statement or its context gets out."""
    state = error.sqlstate or ""
    message = error.diag.message_primary or str(error)
    if state in PROBLEMS:
        hint = error.diag.message_hint
        return Problem(PROBLEMS[state], f"{message}; {hint}" if hint else message)
    if isinstance(error, psycopg.errors.QueryCanceled):
        return Problem(TOO_SLOW, "the database did not answer in time; ask for less, or try again")
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return Problem(READ_ONLY, "the database is read-only (a standby, or a failover goes on); try again")
    if isinstance(error, psycopg.errors.UndefinedTable):
        return Problem(PROBLEMS["PT013"], "the generation was dropped while it was read; try again")
    if state[:2] == "54":  # a limit of Postgres' own: depth of an expression, size of an index row
        return Problem(TOO_COMPLEX, f"{message}; ask for less at once")
    if isinstance(error, psycopg.OperationalError) or state[:2] in ("08", "57"):
        return Problem(NO_DATABASE, "the database does not answer; try again")
    if isinstance(error, psycopg.DataError) or state[:2] == "22":
        return Problem(UNREADABLE, message)
    return Problem(INTERNAL, "the failure is in the server's log, under the id of this request")


def user_error(error: psycopg.Error) -> UserError:
    """The same for the command line; an error that is nobody's question is raised again as it is."""
    problem = from_postgres(error)
    if problem.kind is INTERNAL:
        raise error
    return UserError(problem.detail)

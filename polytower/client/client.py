"""A typed client of the HTTP API: `Client("http://127.0.0.1:8000").retrieve(user_id="196", k=10)`.

Synchronous; one client serves many threads over kept connections. Vectors travel as base64 of little-endian float32.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from urllib.parse import quote, urlencode

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polytower.client.transport import (
    BusyError,
    ClientError,
    InvalidError,
    NotAllowedError,
    NotFoundError,
    ProblemError,
    Transport,
)

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Answer",
    "BusyError",
    "Candidate",
    "Client",
    "ClientError",
    "Interaction",
    "Interest",
    "InvalidError",
    "Merge",
    "Neighbour",
    "NotAllowedError",
    "NotFoundError",
    "ProblemError",
    "Question",
    "Space",
]

ARROW = "application/vnd.apache.arrow.stream"
# Of a generation: item, content, id; and the content encoders' own: text, image, …
Space = str
Merge = Literal["max", "quota", "rrf", "soft", "diverse", "sum"]
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One retrieval question: exactly one of user_id, history, vectors [K, D], and text or image (or both of these).

    A user or a history may come with a text or image: towers that read queries tell what this user would take who
    searches for the text; else, or with mix (the share of the text or image in the score), both are weighed.

    attributes: what is known of somebody with that history, or without one. image: the file's bytes. found_by: whether
    candidates list all interests that found them. features: a feature service, such as "ranker". The rest as in
    docs/http.md.
    """

    user_id: str | None = None
    history: Sequence[str] | None = None
    attributes: Mapping[str, Any] | None = None
    vectors: ArrayLike | None = None
    weights: Sequence[float] | None = None
    text: str | None = None
    image: bytes | None = None
    space: Space | None = None
    mix: float | None = None
    k: int = 100
    filter: Mapping[str, Any] | None = None
    exclude_seen: bool = True
    exclude: Sequence[str] = ()
    allow: Sequence[str] | None = None
    merge: Merge = "max"
    diversity: Mapping[str, Any] | None = None
    titles: bool = False
    found_by: bool = True
    features: str | None = None
    similarity: bool = False
    relevant: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The request's body; what was left at its default is not sent."""
        body: dict[str, Any] = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("vectors", "image", "titles") and getattr(self, each.name) != each.default
        }
        if self.vectors is not None:
            body["vectors"] = [_encoded(row) for row in np.atleast_2d(np.asarray(self.vectors))]
        if self.image is not None:
            body["image"] = base64.b64encode(self.image).decode()
        if self.titles:
            body["fields"] = ["title"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in body.items()}


@dataclass(frozen=True)
class Candidate:
    """One retrieved item, with the interest that gave its score. found_by: all that found it, unless left out."""

    item_id: str
    score: float
    rank: int
    interest: int
    interest_rank: int
    found_by: list[dict[str, Any]] = field(default_factory=list)
    title: str | None = None
    features: dict[str, Any] | None = None
    similarity: dict[str, Any] | None = None
    relevant: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """Candidates of one generation, best first. degraded: why the answer is less than it could be, else None."""

    generation: int
    interests: Literal["stored", "online", "given", "content"]
    candidates: list[Candidate]
    skipped: list[str]
    degraded: str | None
    user_features: dict[str, Any] | None = None


@dataclass(frozen=True)
class Neighbour:
    """One item near another."""

    item_id: str
    score: float
    rank: int


@dataclass(frozen=True)
class Interest:
    """One stored interest of a user. embedding: float32 [D], unit length."""

    interest: int
    weight: float
    embedding: NDArray[np.float32]
    as_of: datetime


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """One event. occurred_at: aware; None for now. event_id: with it the event can be sent again safely."""

    user_id: str
    item_id: str
    occurred_at: datetime | None = None
    event_id: str = ""
    kind: str = "interaction"
    value: float | None = None
    query: str | None = None


class Client:
    """The API of one server. Raises ProblemError (with the server's document) or ClientError, both UserError.

    key: an API key, where the server wants one. timeout: seconds of each attempt. retries: after 429 and 503, honouring
    Retry-After up to `wait` seconds, and after broken connections.
    """

    def __init__(
        self, url: str, *, key: str | None = None, timeout: float = 15.0, retries: int = 3, wait: float = 10.0
    ) -> None:
        headers = {"User-Agent": "polytower-client", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._transport = Transport(url.rstrip("/"), headers, timeout, retries, wait)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections that are kept."""
        self._transport.close()

    def retrieve(self, question: Question | None = None, **parts: Any) -> Answer:
        """Answers one question, given whole or by its parts: `retrieve(user_id="196", k=10)`."""
        return _answer(self._ask("POST", "/v1/retrieve", (question or Question(**parts)).as_json()))

    def retrieve_table(self, question: Question | None = None, **parts: Any) -> "pa.Table":
        """The same as an Arrow table: one row per candidate with all features; the rest in the schema's metadata."""
        return self._table("/v1/retrieve", (question or Question(**parts)).as_json())

    def retrieve_batch(self, questions: Sequence[Question]) -> list[Answer | ProblemError]:
        """Up to 64 questions from one generation; a question that fails has its problem in its place, not raised."""
        body = {"requests": [question.as_json() for question in questions]}
        return [
            ProblemError(each, each["status"]) if "candidates" not in each else _answer(each)
            for each in self._ask("POST", "/v1/retrieve:batch", body)["answers"]
        ]

    def similar(
        self,
        item_id: str,
        *,
        k: int = 10,
        space: Space = "item",
        filter: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> list[Neighbour]:
        """Items most like one item."""
        asked = urlencode({"k": k, "space": space, "filter": json.dumps(dict(filter or {}))})
        found = self._ask("GET", f"/v1/items/{quote(item_id, safe='')}/similar?{asked}")
        return [_row(Neighbour, each) for each in found["items"]]

    def interests(self, user_id: str) -> list[Interest]:
        """A user's interests in the live generation."""
        found = self._ask("GET", f"/v1/users/{quote(user_id, safe='')}/interests?vectors=base64")
        return [
            Interest(
                each["interest"], each["weight"], _decoded(each["embedding"]), datetime.fromisoformat(each["as_of"])
            )
            for each in found["interests"]
        ]

    def interact(self, interactions: Sequence[Interaction]) -> tuple[int, int]:
        """Sends events, all or none: (accepted, duplicates). Repeated after a broken connection only with event ids."""
        rows = [
            {
                each.name: value.isoformat() if isinstance(value, datetime) else value
                for each in fields(event)
                if (value := getattr(event, each.name)) != each.default
            }
            for event in interactions
        ]
        safe = all(event.event_id for event in interactions)
        found = self._ask("POST", "/v1/interactions", {"interactions": rows}, safe=safe)
        return found["accepted"], found["duplicates"]

    def features(
        self,
        service: str | None,
        *,
        similarity: bool = False,
        relevant: int | None = None,
        **entities: Sequence[str],
    ) -> "pa.Table":
        """Features as an Arrow table: `features("ranker", user_id=["196"], item_id=["50"])`."""
        body = {"entities": {name: list(ids) for name, ids in entities.items()}, "similarity": similarity}
        further = {"service": service or None, "relevant": relevant}
        return self._table("/v1/features", body | {name: each for name, each in further.items() if each is not None})

    def generations(self) -> list[dict[str, Any]]:
        """All generations, newest first."""
        found: list[dict[str, Any]] = self._ask("GET", "/v1/generations")["generations"]
        return found

    def ready(self) -> int:
        """The live generation. Raises BusyError while there is none, or no Postgres."""
        return int(self._ask("GET", "/readyz")["generation"])

    def _ask(self, method: str, path: str, body: Any = None, *, safe: bool = True) -> Any:
        return self._transport.request(method, path, body, safe=safe).json()

    def _table(self, path: str, body: Any) -> "pa.Table":
        import pyarrow as pa

        return pa.ipc.open_stream(self._transport.request("POST", path, body, accept=ARROW).body).read_all()


def _answer(document: Mapping[str, Any]) -> Answer:
    candidates = [_row(Candidate, each) for each in document["candidates"]]
    return _row(Answer, {**document, "candidates": candidates})


def _row(kind: type[Row], document: Mapping[str, Any]) -> Row:
    """A dataclass from what it knows of a document: a newer server may say more."""
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind(**{name: value for name, value in document.items() if name in known})


def _encoded(row: NDArray[Any]) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def _decoded(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)

"""HTTP for the client: kept connections, timeouts, retries that honour Retry-After."""

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson

from polytower.errors import UserError


class ClientError(UserError):
    """The server did not answer as it should: unreachable, cut off, or no HTTP of ours."""


class ProblemError(ClientError):
    """The server answered with a problem document (RFC 9457).

    status: of HTTP. slug: the type's last part, such as "unknown-user". problem: the whole document.
    """

    def __init__(self, problem: Mapping[str, Any], status: int) -> None:
        self.problem = dict(problem)
        self.status = status
        self.slug = str(problem.get("type", "")).rsplit("/", 1)[-1]
        super().__init__(f"{problem.get('title', 'problem')} ({status}): {problem.get('detail', '')}")


class NotAllowedError(ProblemError):
    """401 or 403: no key, an invalid one, or one without the scope."""


class NotFoundError(ProblemError):
    """404: an unknown user, item or feature service."""


class InvalidError(ProblemError):
    """409, 413 or 422: asking again in the same way fails in the same way."""


class BusyError(ProblemError):
    """429 or 503, still after the last retry."""


ERRORS: dict[int, type[ProblemError]] = {
    401: NotAllowedError,
    403: NotAllowedError,
    404: NotFoundError,
    409: InvalidError,
    413: InvalidError,
    422: InvalidError,
    429: BusyError,
    503: BusyError,
}


@dataclass(frozen=True)
class Reply:
    """One answered request. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, read as JSON."""
        return orjson.loads(self.body)


@dataclass
class Transport:
    """A pool of connections to one server; safe to share between threads.

    timeout: seconds for each attempt's connect and for each read. retries: further attempts after 429, 503 or a
    connection that broke. wait: longest pause in seconds between two attempts, whatever Retry-After says.
    """

    url: str
    headers: Mapping[str, str]
    timeout: float
    retries: int
    wait: float
    sleep: Callable[[float], None] = time.sleep
    _idle: list[http.client.HTTPConnection] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        split = urlsplit(self.url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise ClientError(f"{self.url!r} is not a server address; give one such as http://127.0.0.1:8000")
        self._prefix = split.path.rstrip("/")
        self._kind = http.client.HTTPSConnection if split.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = split.hostname, split.port

    def request(
        self, method: str, path: str, body: Any = None, *, accept: str = "application/json", safe: bool = True
    ) -> Reply:
        """Sends one request, JSON body if any. Raises ProblemError for problem documents, else ClientError.

        safe: whether the request may be sent again when the server may have acted on it already.
        """
        sent = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = {**self.headers, "Accept": accept, **({"Content-Type": "application/json"} if sent else {})}
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                reply = self._once(method, self._prefix + path, sent, headers, fresh=not safe)
            except (OSError, http.client.HTTPException) as error:
                if last or not (safe or isinstance(error, ConnectionRefusedError)):
                    raise ClientError(
                        f"{method} {self.url}{path}: no answer ({error or type(error).__name__})"
                    ) from error
                self.sleep(self._pause(attempt, None))
                continue
            # 503 may come from a deadline that passed after the server had acted.
            if reply.status in (429, 503) and not last and (safe or reply.status == 429):
                self.sleep(self._pause(attempt, reply.headers.get("retry-after")))
                continue
            return self._checked(reply, method, path)
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Closes the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], *, fresh: bool) -> Reply:
        """One exchange. fresh: on a connection of its own, whose end can only mean the request's."""
        with self._lock:
            connection = self._idle.pop() if self._idle and not fresh else None
        kept = connection is not None
        connection = connection or self._kind(self._host, self._port, timeout=self.timeout)
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            reply = Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            # The server may have closed a kept connection before: no reason to wait.
            if kept and isinstance(error, ConnectionError):
                return self._once(method, path, body, headers, fresh=True)
            raise
        if answer.will_close:
            connection.close()
        else:
            with self._lock:
                self._idle.append(connection)
        return reply

    def _pause(self, attempt: int, retry_after: str | None) -> float:
        """What the server says, else twice as long each time; a little more, so that clients do not return as one."""
        told = float(retry_after) if retry_after and retry_after.isdigit() else 0.1 * 2**attempt
        return min(self.wait, told) * (1 + 0.1 * random.random())  # noqa: S311 nothing secret

    def _checked(self, reply: Reply, method: str, path: str) -> Reply:
        if reply.status < 300:
            return reply
        if not reply.headers.get("content-type", "").startswith("application/problem+json"):
            raise ClientError(
                f"{method} {self.url}{path}: HTTP {reply.status} without a problem document: not a polytower server?"
            )
        raise ERRORS.get(reply.status, ProblemError)(reply.json(), reply.status)

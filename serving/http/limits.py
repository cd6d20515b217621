"""What keeps one request from hurting the others: who may ask, body cap, bounds, deadline. Plain ASGI.

Every request gets an id, which its response and the server's log name.
"""

import asyncio
import re
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address
from time import perf_counter

import psycopg
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import INTERNAL, REQUEST_ID, TOO_LARGE, TOO_LATE, TOO_MANY, TOO_SLOW, Problem
from serving.http.respond import problem_of, send_problem
from serving.metrics import ServerMetrics

# Ids that are taken from a request: what a log line and a header can hold as they are.
SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
# For each request that is answered, so many may be on their way in: waiting for their key, or sending their body.
ARRIVING = 4
SENDING = 30.0

Admit = Callable[[Scope], Awaitable[str | None]]


class Limits:
    """Wraps the application; every refusal is a problem response.

    body: bytes; reading: seconds in which it has to arrive. concurrency: requests below /v1 that are answered at once,
    waiting for the pool included; per_client: of these and of those on their way in, one client's (the key, else the
    address). deadline: seconds, from the first byte of the request on. admit: says which key a request brings, or
    raises Problem; None: needs no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: ServerMetrics,
        *,
        body: int,
        concurrency: int,
        deadline: float,
        per_client: int | None = None,
        reading: float | None = None,
        admit: Admit | None = None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.body = body
        self.reading = deadline if reading is None else reading
        self.concurrency = concurrency
        self.per_client = per_client or concurrency
        self.deadline = deadline
        self.admit = admit
        self.running = 0
        self.arriving = 0
        self.clients: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Probes, documentation and metrics take no place: they must answer when everything else is full."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = perf_counter()
        answer = _Answer(send, _request_id(scope))
        REQUEST_ID.set(answer.request_id)
        bounded = scope["path"].startswith("/v1/")
        try:
            await self._within_deadline(scope, receive, answer, bounded=bounded)
        except Exception as error:
            # One that was answered is in the log already.
            if not answer.started:
                await send_problem(answer, problem_of(error), self.metrics)
        finally:
            if bounded:
                route = getattr(scope.get("route"), "path_format", "none")
                self.metrics.request(route, answer.status, perf_counter() - started)

    async def _within_deadline(self, scope: Scope, receive: Receive, answer: "_Answer", *, bounded: bool) -> None:
        try:
            async with asyncio.timeout(self.deadline) as answer.deadline:
                if bounded:
                    await self._bounded(scope, receive, answer)
                else:
                    await self._admitted(scope)
                    await self.app(scope, receive, answer)
        except TimeoutError:
            problem = Problem(TOO_SLOW, f"no answer within {self.deadline:g} s; ask for less, or try again")
            await self._refuse(answer, problem)
        except (Problem, psycopg.Error) as error:
            await self._refuse(answer, problem_of(error))

    async def _bounded(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Who has no key, or has not sent the whole question, takes no place among those that are answered."""
        with self._arrival():
            client = await self._admitted(scope)
        with self._of(client or address_of(scope)):
            with self._arrival():
                body = await self._read(scope, receive)
            with self._place():
                await self.app(scope, _replay(body, receive), answer)

    async def _admitted(self, scope: Scope) -> str | None:
        return None if self.admit is None else await self.admit(scope)

    @contextmanager
    def _arrival(self) -> Iterator[None]:
        if self.arriving >= ARRIVING * self.concurrency:
            raise Problem(TOO_MANY, f"{self.arriving} requests are on their way in; try again")
        self.arriving += 1
        try:
            yield
        finally:
            self.arriving -= 1

    @contextmanager
    def _of(self, client: str) -> Iterator[None]:
        if self.clients[client] >= self.per_client:
            raise Problem(TOO_MANY, f"{self.per_client} requests of this client are being answered; try again")
        self.clients[client] += 1
        try:
            yield
        finally:
            self.clients[client] -= 1
            if not self.clients[client]:
                del self.clients[client]

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.running >= self.concurrency:
            raise Problem(TOO_MANY, f"{self.concurrency} requests are being answered; try again")
        self.running += 1
        self.metrics.in_flight.set(self.running)
        try:
            yield
        finally:
            self.running -= 1
            self.metrics.in_flight.set(self.running)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises Problem as soon as it is larger than the cap, whatever its header says, or late."""
        too_large = Problem(TOO_LARGE, f"a body holds at most {self.body} bytes")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self.body:
            raise too_large
        chunks, more = bytearray(), True
        try:
            async with asyncio.timeout(self.reading):
                while more:
                    message = await receive()
                    chunks += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(chunks) > self.body:
                        raise too_large
        except TimeoutError as error:
            raise Problem(TOO_LATE, f"the body did not arrive within {self.reading:g} s") from error
        return bytes(chunks)

    async def _refuse(self, answer: "_Answer", problem: Problem) -> None:
        answer.deadline = None  # is over
        if answer.started:
            self.metrics.problem(problem.kind.slug)
        else:
            await send_problem(answer, problem, self.metrics)


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode("ascii") if SANE_ID.fullmatch(given) else secrets.token_hex(8)


def address_of(scope: Scope) -> str:
    """The client's address; of IPv6 the first half, of which everybody has the other half to himself."""
    client = scope.get("client")
    address = client[0] if client else ""
    if ":" not in address:
        return address
    try:
        return IPv6Address(address.partition("%")[0]).exploded[:19]
    except ValueError:
        return address


class _Answer:
    """Remembers whether the response has begun, and with which status; adds the request's id.

    deadline: of the response's beginning. One that has begun is finished, since cut short it would be no answer at all;
    unless the client does not take it within SENDING seconds.
    """

    def __init__(self, send: Send, request_id: str) -> None:
        self.send = send
        self.request_id = request_id
        self.started = False
        self.status = INTERNAL.status
        self.deadline: asyncio.Timeout | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.deadline is not None:
                if self.deadline.expired():
                    await asyncio.sleep(0)  # the cancellation is on its way, and arrives here
                self.deadline.reschedule(asyncio.get_running_loop().time() + SENDING)
            self.started = True
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.request_id.encode())]
        await self.send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that hands out the body that was read, then whatever the client does next."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed

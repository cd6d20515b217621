"""What keeps one request from hurting the others: body cap, bounded concurrency, deadline. Plain ASGI."""

import asyncio
import json
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import INTERNAL, MEDIA_TYPE, TOO_LARGE, TOO_MANY, TOO_SLOW, Problem
from serving.metrics import Metrics


class Limits:
    """Wraps the application; every refusal is a problem response.

    body: bytes. concurrency: requests below /v1 in flight at once, waiting for the pool included. deadline: seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        body: int,
        concurrency: int,
        deadline: float,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.body = body
        self.concurrency = concurrency
        self.deadline = deadline
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Health, readiness and metrics stay outside: they must answer when everything else is full."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        started = perf_counter()
        answer = _Answer(send)
        try:
            await self._limited(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path_format", "none")
            self.metrics.request(route, answer.status, perf_counter() - started)

    async def _limited(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        if self.running >= self.concurrency:
            await self._refuse(answer, Problem(TOO_MANY, f"{self.concurrency} requests are being answered; try again"))
            return
        self.running += 1
        self.metrics.in_flight.set(self.running)
        try:
            async with asyncio.timeout(self.deadline) as answer.deadline:
                body = await self._read(scope, receive)
                if body is None:
                    await self._refuse(answer, Problem(TOO_LARGE, f"a body holds at most {self.body} bytes"))
                    return
                await self.app(scope, _replay(body, receive), answer)
        except TimeoutError:
            answer.deadline = None
            await self._refuse(
                answer, Problem(TOO_SLOW, f"no answer within {self.deadline:g} s; ask for less, or try again")
            )
        finally:
            self.running -= 1
            self.metrics.in_flight.set(self.running)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None as soon as it is larger than the cap, whatever its header says."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.body:
            return None
        chunks = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            chunks += message.get("body", b"")
            more = message.get("more_body", False)
            if len(chunks) > self.body:
                return None
        return bytes(chunks)

    async def _refuse(self, answer: "_Answer", problem: Problem) -> None:
        if answer.started:
            self.metrics.problem(problem.kind.slug)
        else:
            await send_problem(answer, problem, self.metrics)


async def send_problem(send: Send, problem: Problem, metrics: Metrics) -> None:
    """Answers a request with a problem response, and counts it."""
    metrics.problem(problem.kind.slug)
    headers = {"content-type": MEDIA_TYPE, **problem.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.kind.status, "headers": encoded})
    await send({"type": "http.response.body", "body": json.dumps(problem.as_json()).encode()})


class _Answer:
    """Remembers whether the response has begun, and with which status.

    deadline: of the response's beginning. One that has begun is finished: cut short it would be no answer at all.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.started = False
        self.status = INTERNAL.status
        self.deadline: asyncio.Timeout | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.deadline is not None:
                if self.deadline.expired():
                    await asyncio.sleep(0)  # the cancellation is on its way, and arrives here
                self.deadline.reschedule(None)
            self.started = True
            self.status = message["status"]
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

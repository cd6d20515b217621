"""Rounds under a server: clients post and ask all the time, and what was answered 200 has to be there."""

import json
import os
import signal
import socket
import threading
import time
from http.client import HTTPConnection, HTTPException
from typing import Any

from tests.faults.checks import Fault
from tests.faults.data import USERS
from tests.faults.home import Command
from tests.faults.ledger import Event
from tests.faults.rounds import Field, Round, _again, _kill_postmaster, look, survivable

CLIENTS = 3
EVENTS = 3


class Clients:
    """Threads that post events with ids of their own (no times: the server's clock gives them) and ask for candidates.

    unanswered: requests that may or may not have been taken; sent again by `settle`, as a client would.
    """

    def __init__(self, field: Field, port: int) -> None:
        self.field, self.port = field, port
        self.unanswered: list[tuple[frozenset[Event], dict[str, Any]]] = []
        self.posted = self.asked = 0
        self.unexpected: list[str] = []
        self._stop = threading.Event()
        name = f"r{field.random.getrandbits(40):010x}"
        self._threads = [threading.Thread(target=self._work, args=(f"{name}-{n}",)) for n in range(CLIENTS)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def settle(self, bound: float) -> bool:
        """Sends what was not answered once more until it is; False when that does not come to pass."""
        until = time.monotonic() + bound
        while self.unanswered and time.monotonic() < until:
            group, body = self.unanswered[0]
            if self._post(group, body):
                self.unanswered.pop(0)
            else:
                time.sleep(0.05)
        return not self.unanswered

    def _work(self, name: str) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            user = f"u{number % USERS}"
            ids = [f"{name}-{number}-{n}" for n in range(EVENTS)]
            events = [{"user_id": user, "item_id": f"i{n}", "event_id": one} for n, one in enumerate(ids)]
            body = {"interactions": events}
            group = self.field.ledger.send((one,) for one in ids)
            if not self._post(group, body):
                self.unanswered.append((group, body))
                self._stop.wait(0.05)
            question = {"user_id": user, "k": 5, "exclude_seen": False}
            status, answer = request(self.port, "POST", "/v1/retrieve", question)
            self.asked += status == 200
            if status == 200 and len(answer["candidates"]) != 5:
                self.unexpected.append(f"{len(answer['candidates'])} candidates for {user}")
            if status == 500:
                self.unexpected.append(f"a question is answered 500: {answer}")

    def _post(self, group: frozenset[Event], body: dict[str, Any]) -> bool:
        status, answer = request(self.port, "POST", "/v1/interactions", body)
        if status == 200:
            self.field.ledger.acknowledge(group)
            self.posted += 1
        elif status in (400, 422, 500):
            self.unexpected.append(f"events are answered {status}: {answer}")
        return status == 200


def request(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """(status, answer); status 0 when nobody answered."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, HTTPException, ValueError):
        return 0, None
    finally:
        connection.close()


def killed_server(field: Field) -> Round:
    """The server dies under posts and questions; another one takes its place, and clients send again."""
    found = Round("serve")
    port = _free_port()
    server = _serve(field, port)
    if not _ready(server, port, field.bound):
        found.faults.append(Fault("stuck", f"serve does not get ready: {server.said()[-300:]}"))
        server.kill()
        return found
    with Clients(field, port) as clients:
        _traffic_for(field, clients, found)
        server.kill()
    found.killed = f"process {server.process.pid}"
    found.phase = _traffic(clients)
    started = time.monotonic()
    server = _serve(field, port)
    with survivable(field, found):
        if not (_ready(server, port, field.bound) and clients.settle(field.bound)):
            found.faults.append(Fault("stuck", f"serve does not come back: {server.said()[-300:]}"))
        found.recovered = time.monotonic() - started
        _stop(server, found)
        _judge(field, clients, found)
    return found


def killed_postgres_under_serve(field: Field) -> Round:
    """Postgres dies under the server; the next command starts it, and the same server answers again."""
    found = Round("postgres under serve")
    port = _free_port()
    server = _serve(field, port)
    if not _ready(server, port, field.bound):
        found.faults.append(Fault("stuck", f"serve does not get ready: {server.said()[-300:]}"))
        server.kill()
        return found
    with survivable(field, found):
        with Clients(field, port) as clients:
            _traffic_for(field, clients, found)
            found.killed = _kill_postmaster(field.home)
        found.phase = _traffic(clients)
        started = time.monotonic()
        _again(field, found, ("init",))
        if not (_ready(server, port, field.bound) and clients.settle(field.bound)):
            found.faults.append(Fault("stuck", f"serve does not get over it: {server.said()[-300:]}"))
        found.recovered = time.monotonic() - started
        _stop(server, found)
        _judge(field, clients, found)
    return found


def _traffic_for(field: Field, clients: Clients, found: Round) -> None:
    """Waits for the first posts to be taken, and then for a moment of traffic."""
    until = time.monotonic() + field.bound
    while not clients.posted and time.monotonic() < until:
        time.sleep(0.002)
    found.moment = field.random.uniform(0, field.seconds["serve"])
    time.sleep(found.moment)


def _serve(field: Field, port: int) -> Command:
    return Command(field.home, "serve", "--port", str(port))


def _ready(server: Command, port: int, bound: float) -> bool:
    until = time.monotonic() + bound
    while time.monotonic() < until and not server.ended:
        if request(port, "GET", "/readyz")[0] == 200:
            return True
        time.sleep(0.02)
    return False


def _stop(server: Command, found: Round) -> None:
    """Ends the server as an operator does."""
    if server.ended:
        found.faults.append(Fault("stuck", f"serve ended by itself: {server.said()[-300:]}"))
        return
    os.kill(server.process.pid, signal.SIGTERM)
    if server.wait(30) is None:
        found.faults.append(Fault("stuck", "serve does not end on SIGTERM within 30 s"))
        server.kill()


def _judge(field: Field, clients: Clients, found: Round) -> None:
    for text in clients.unexpected[:3]:
        found.faults.append(Fault("lost", text))
    look(field, found, placed=False)


def _traffic(clients: Clients) -> str:
    return f"{clients.posted} posts, {clients.asked} answers, {len(clients.unanswered)} unanswered"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])

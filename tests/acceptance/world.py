"""What the steps share: the platform's commands and server as processes, its database, the data's facts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg

from polytower.client import Client
from polytower.postgres import connect
from tests.acceptance.folder import Facts

POLYTOWER = str(Path(sys.executable).with_name("polytower"))
SECONDS_TO_START = 600.0  # on a machine that others keep busy; a server that died is noticed at once


class StepError(Exception):
    """A step's finding that must not be: what was seen."""


def check(holds: bool, seen: str) -> None:
    """Raises StepError, with what was seen, unless it holds."""
    if not holds:
        raise StepError(seen)


def equal(what: str, seen: Any, expected: Any) -> None:
    """Raises StepError unless the two are equal."""
    check(bool(seen == expected), f"{what}: {_short(seen)}, expected {_short(expected)}")


@dataclass
class World:
    """One run. home: POLYTOWER_HOME, set for all processes. generated: the folder is ours, with tastes that we know.

    second: the folder of the second load. options: what differs from the preset. seen: what a step tells for the table.
    """

    home: Path
    folder: Path
    images: Path | None
    preset: str
    generated: bool
    facts: Facts
    options: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    server: "Server | None" = None

    def run(self, *arguments: str | Path | int, statuses: Sequence[int] = (0,)) -> Any:
        """A `polytower` command with --json: the document that it ends with. StepError for any other exit status."""
        return json.loads(self.text(*arguments, "--json", statuses=statuses).splitlines()[-1])

    def text(self, *arguments: str | Path | int, statuses: Sequence[int] = (0,)) -> str:
        """What a `polytower` command writes to stdout."""
        done = subprocess.run([POLYTOWER, *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode not in statuses:
            command = " ".join(map(str, arguments))
            raise StepError(f"polytower {command} ended with status {done.returncode}: {done.stderr[-2000:].strip()}")
        return done.stdout

    @contextmanager
    def database(self) -> Iterator[psycopg.Connection[Any]]:
        """SQL as an analyst has it; the embedded server stays up from the first connection to this process's end."""
        with connect() as connection:
            yield connection

    def sql(self, statement: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
        """All rows of one statement, in a transaction of its own."""
        with self.database() as connection:
            return connection.execute(statement, parameters).fetchall()

    def number(self, statement: str, parameters: Any = ()) -> int:
        """The one number that a statement answers."""
        return int(self.sql(statement, parameters)[0][0])

    @property
    def client(self) -> Client:
        """The running server's client."""
        assert self.server is not None
        return self.server.client

    def start_server(self, **environment: str) -> None:
        """`polytower serve --warm`, ready."""
        self.server = Server(self.home / "server.log", environment)

    def stop_server(self) -> None:
        """Ends the server as Ctrl-C does. StepError if it does not go in peace."""
        if self.server is not None:
            server, self.server = self.server, None
            # as a shell tells a command that SIGTERM ended
            equal("status of a server that is told to end", server.stop(), 128 + signal.SIGTERM)


class Server:
    """`polytower serve` on a free port, its talk in a log. StepError, with the log's end, if it does not start."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = Client(self.url, timeout=60, retries=10, wait=60)
        self._log = log
        with log.open("a") as file:
            command = [POLYTOWER, "serve", "--warm", "--port", str(port)]
            self._process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def post(self, path: str, body: Any) -> Any:
        """The JSON answer to a JSON body, without the client in between."""
        answer = httpx.post(self.url + path, json=body, timeout=60)
        check(answer.status_code == 200, f"POST {path}: {answer.status_code} {answer.text[:500]}")
        return answer.json()

    def stop(self) -> int:
        """Its exit status."""
        self.client.close()
        self._process.terminate()
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise StepError(f"the server is not ready; the end of its log:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}…"

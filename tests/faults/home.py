"""One home under test: its Postgres, the commands that run on it, and the processes that belong to it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import psycopg

from polytower.postgres import EmbeddedPostgres

# The environment variable by which every process that a command ever started is found again.
MARK = "POLYTOWER_FAULTS_HOME"
APPLICATION = "faults"
# The newest statement of each connection but the harness's own, the newest first.
STATEMENTS = """
select pid, state, query from pg_stat_activity
where datname = current_database() and backend_type = 'client backend' and application_name <> %(own)s
order by query_start desc nulls last limit 20
"""


class Home:
    """A folder as POLYTOWER_HOME. Commands on it carry a mark in their environment, and so do their children.

    url: another database than the one of the embedded server in the folder.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.folder = folder
        self.url = url
        self.mark = uuid4().hex
        self.server = EmbeddedPostgres(folder / "postgres")
        self._observer: psycopg.Connection[Any] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a command on this home sees."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith("POLYTOWER_")}
        own = {"POLYTOWER_HOME": str(self.folder), "POLYTOWER_DEVICE": "cpu", MARK: self.mark}
        return {**plain, **own, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def connect(self) -> psycopg.Connection[Any]:
        """A connection of the harness; it commits each statement."""
        options = {"options": "-c search_path=polytower,public", "application_name": APPLICATION}
        return psycopg.connect(self.url or self.server.url, autocommit=True, **options)

    def statements(self) -> list[tuple[int, str, str]]:
        """(pid, state, statement) of the connections of commands; empty while Postgres does not answer."""
        try:
            if self._observer is None:
                self._observer = self.connect()
            return self._observer.execute(STATEMENTS, {"own": APPLICATION}).fetchall()
        except (psycopg.OperationalError, FileNotFoundError):
            self.close()
            return []

    def close(self) -> None:
        """Gives the observing connection back."""
        if self._observer is not None:
            self._observer.close()
        self._observer = None

    def postmaster(self) -> int | None:
        """The process id in postmaster.pid."""
        try:
            return int((self.server.data / "postmaster.pid").read_text().split()[0])
        except (FileNotFoundError, IndexError, ValueError):
            return None

    def processes(self) -> list[psutil.Process]:
        """Live processes of this home that are neither Postgres nor the harness."""
        return [each for each in self._marked() if not _is_postgres(each)]

    def postgres_processes(self) -> list[psutil.Process]:
        """Postmasters (and what initialises them) of this home, whoever started them."""
        folder = str(self.server.directory)
        return [each for each in psutil.process_iter() if _is_postgres(each) and folder in _place(each)]

    def sweep(self) -> None:
        """Ends whatever is left of the home's commands, so that one fault does not spoil the next round."""
        for each in self.processes():
            each.kill()

    def _marked(self) -> list[psutil.Process]:
        found = []
        for each in psutil.process_iter():
            try:
                if each.environ().get(MARK) == self.mark and each.status() != psutil.STATUS_ZOMBIE:
                    found.append(each)
            except (psutil.Error, OSError):
                continue  # it ended meanwhile, or is somebody else's
        return found


class Command:
    """A polytower command in a process of its own; all it says goes to one file."""

    def __init__(self, home: Home, *arguments: str) -> None:
        self.home = home
        self.arguments = arguments
        self.log = home.folder.parent / f"{uuid4().hex}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "polytower.cli", *arguments],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=home.environment,
                start_new_session=True,
            )  # fmt: skip
        self.started = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self.process.poll() is not None

    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace")

    def shows(self, sign: str) -> bool:
        """Whether a regular expression is met by its output or by a statement on the database.

        While it has child processes, its last line is also met with the words "with children" behind it.
        """
        said = self.said()
        signs = [said, *(statement for _, _, statement in self.home.statements())]
        if self._children():
            signs.append(f"{said.strip().rpartition(chr(10))[2]} with children")
        return any(re.search(sign, each) for each in signs)

    def _children(self) -> bool:
        # The file that psutil would find among all processes of the machine.
        try:
            return bool(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().strip())
        except OSError:
            return False

    def wait_for(self, sign: str, bound: float) -> bool:
        """Waits until the command shows a sign; False when it ended, or the bound passed, before."""
        while time.monotonic() - self.started < bound:
            if self.shows(sign):
                return True
            if self.ended:
                return False
            time.sleep(0.003)
        return False

    def wait(self, bound: float) -> float | None:
        """Seconds until the process ended; None when it did not within the bound."""
        started = time.monotonic()
        try:
            self.process.wait(bound)
        except subprocess.TimeoutExpired:
            return None
        return time.monotonic() - started

    def kill(self) -> None:
        """kill −9 of the process alone: its children are the platform's to think of."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def _place(process: psutil.Process) -> str:
    """Where a process works: a postmaster names its folder, or is in it."""
    try:
        return " ".join([*process.cmdline(), process.cwd()])
    except (psutil.Error, OSError):
        return ""


def _is_postgres(process: psutil.Process) -> bool:
    try:
        return process.name() in ("postgres", "initdb", "pg_ctl")
    except psutil.Error:
        return False

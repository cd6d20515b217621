"""The embedded Postgres, shared by processes: each that uses it holds a lease, and the last one out stops it.

TCP with a password, so that Dagster, Feast, psql and the HTTP server reach it from their own processes. `polytower db
start` pins it: then it outlives its last lease.
"""

import atexit
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg
from filelock import FileLock, Timeout
from psycopg import sql

from polytower.cluster import PATIENCE_SECONDS, Cluster
from polytower.errors import UserError
from polytower.files import private_folder, write_private

DATABASE = "polytower"
# The role of the HTTP server (migrations/privileges.py says what it may); its login is made here, with the database.
SERVER_ROLE = "polytower_server"
# How long a Postgres that runs may refuse us before that is told.
TRIED_SECONDS = 10.0
_HELD: dict[Path, "EmbeddedPostgres"] = {}


class EmbeddedPostgres:
    """A Postgres server in a folder, shared by processes.

    directory: created when absent. Holds `data/` (the cluster), `port`, `password` and `server_password` (0600),
    `leases.json`, `pinned`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cluster = Cluster(directory)

    @property
    def data(self) -> Path:
        """Folder of the cluster."""
        return self.cluster.data

    @property
    def url(self) -> str:
        """libpq URL of the owner, with the generated password."""
        return self._url("postgres", "password")

    @property
    def server_url(self) -> str:
        """libpq URL of the HTTP server's own role."""
        return self._url(SERVER_ROLE, "server_password")

    @property
    def running(self) -> bool:
        """Whether a postmaster of this folder is alive."""
        return self.cluster.postmaster() is not None

    def acquire(self) -> str:
        """Starts the server if need be, takes a lease for this process, and answers the URL."""
        private_folder(self.directory)
        with self._lock():
            self.cluster.ensure_made()
            self._start()
            self.cluster.prune_logs()
            self._write_leases([*self._live_leases(), _this_process()])
        return self.url

    def release(self) -> None:
        """Gives this process's lease back; stops the server when it was the last and nothing pinned it."""
        if not self.directory.exists():
            return
        with self._lock():
            leases = [lease for lease in self._live_leases() if lease != _this_process()]
            with suppress(OSError):  # a full disk: the lease of a process that has gone counts for nothing
                self._write_leases(leases)
            if not leases and not self.pinned:
                self.cluster.stop()

    @property
    def pinned(self) -> bool:
        """Whether the server outlives its last lease."""
        return (self.directory / "pinned").exists()

    def pin(self) -> None:
        """Keeps the server up after the last process has gone (`polytower db start`)."""
        (self.directory / "pinned").touch()

    def stop(self) -> None:
        """Unpins and stops the server, whoever holds a lease."""
        if not self.directory.exists():
            return
        with self._lock():
            (self.directory / "pinned").unlink(missing_ok=True)
            self._write_leases([])
            self.cluster.stop()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            with FileLock(self.directory / "lock", timeout=2 * PATIENCE_SECONDS):
                yield
        except Timeout as error:
            raise UserError(
                f"another process has held {self.directory / 'lock'} for {2 * PATIENCE_SECONDS} s while starting or"
                " stopping the embedded Postgres: end it, and try again"
            ) from error

    def _url(self, user: str, password: str) -> str:
        secret = quote((self.directory / password).read_text().strip(), safe="")
        port = self.cluster.port_file.read_text().strip()
        return f"postgresql://{user}:{secret}@127.0.0.1:{port}/{DATABASE}"

    def _start(self) -> None:
        """Starts it and sees to its database; once more when it dies or recovers meanwhile."""
        deadline = time.monotonic() + TRIED_SECONDS
        while True:
            self.cluster.start()
            try:
                self._ensure_database()
                return
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise UserError(f"the embedded Postgres in {self.directory} is running, but: {error}") from error
                time.sleep(0.1)

    def _ensure_database(self) -> None:
        with psycopg.connect(self.url.removesuffix(DATABASE) + "postgres", autocommit=True) as connection:
            found = connection.execute("select 1 from pg_database where datname = %s", [DATABASE]).fetchone()
            if not found:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))
            if not (self.directory / "server_password").exists():
                self._make_server_role(connection)

    def _make_server_role(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        role, password = sql.Identifier(SERVER_ROLE), secrets.token_urlsafe(24)
        found = connection.execute("select 1 from pg_roles where rolname = %s", [SERVER_ROLE]).fetchone()
        if not found:
            connection.execute(sql.SQL("create role {}").format(role))
        connection.execute(sql.SQL("alter role {} login password {}").format(role, sql.Literal(password)))
        # What it is refused goes to whoever asked, as a problem; a line of Postgres's log each would fill the disk.
        connection.execute(sql.SQL("alter role {} set log_min_messages = 'fatal'").format(role))
        write_private(self.directory / "server_password", password)

    def _live_leases(self) -> list[list[float]]:
        path = self.directory / "leases.json"
        leases = json.loads(path.read_text()) if path.exists() else []
        return [lease for lease in leases if _alive(*lease)]

    def _write_leases(self, leases: list[list[float]]) -> None:
        write_private(self.directory / "leases.json", json.dumps(leases))


def held(directory: Path) -> EmbeddedPostgres:
    """The server of this folder, started if need be; this process keeps its lease until it exits."""
    server = _HELD.get(directory)
    if server is None:
        server = EmbeddedPostgres(directory)
        server.acquire()
        _HELD[directory] = server
        atexit.register(_release, directory)
    return server


def _release(directory: Path) -> None:
    server = _HELD.pop(directory, None)
    if server is not None:
        server.release()


def _this_process() -> list[float]:
    return [os.getpid(), psutil.Process().create_time()]


def _alive(pid: float, created: float) -> bool:
    try:
        process = psutil.Process(int(pid))
        return bool(process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

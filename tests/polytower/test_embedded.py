"""The embedded Postgres where it is not at home: odd folders, kills, stale files; and what it tells nobody."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from polytower.cluster import KEPT_LOGS, USER
from polytower.embedded import EmbeddedPostgres
from polytower.errors import UserError
from polytower.postgres import connect

ACQUIRE = (
    "import sys; from pathlib import Path; from polytower.embedded import EmbeddedPostgres;"
    "EmbeddedPostgres(Path(sys.argv[1])).acquire(); print('up', flush=True); sys.stdin.read()"
)


def as_postgres_runs(*command: str) -> "subprocess.Popen[bytes]":
    """A process of the user that Postgres runs as."""
    return subprocess.Popen(command, **({"user": USER} if os.geteuid() == 0 else {}))


@pytest.fixture(scope="module")
def closed() -> Iterator[Path]:
    """A folder of mode 700, with another one in it whose name a shell would stumble over."""
    outer = Path(tempfile.mkdtemp())
    (outer / "my \"shop' $HOME ü").mkdir(mode=0o700)
    yield outer / "my \"shop' $HOME ü"
    shutil.rmtree(outer)


@pytest.fixture(scope="module")
def embedded(closed: Path) -> Iterator[EmbeddedPostgres]:
    """Made under a locale that is not installed; the tests stop and start it."""
    before = os.environ.get("LC_ALL")
    os.environ["LC_ALL"] = "en_XX.UTF-8"
    server = EmbeddedPostgres(closed / "postgres")
    server.acquire()
    if before is None:
        del os.environ["LC_ALL"]
    else:
        os.environ["LC_ALL"] = before
    yield server
    server.stop()


def test_it_starts_below_closed_folders_with_odd_names_and_leaves_their_modes(
    embedded: EmbeddedPostgres, closed: Path
) -> None:
    with connect(embedded.acquire()) as connection:
        assert connection.execute("select 'Ü' = upper('ü')").fetchone() == (True,)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (closed, closed.parent)] == [0o700, 0o700]


def test_nobody_else_reads_its_files(embedded: EmbeddedPostgres) -> None:
    embedded.acquire()
    open_to_others = [path for path in embedded.directory.rglob("*") if path.lstat().st_mode & 0o077]
    assert all(path.name in ("pinned", "lock") or embedded.data in path.parents for path in open_to_others)
    assert stat.S_IMODE(embedded.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(embedded.data.stat().st_mode) == 0o700


def test_no_rule_lets_anybody_in_without_a_password(embedded: EmbeddedPostgres) -> None:
    with connect(embedded.acquire()) as connection:
        methods = connection.execute("select distinct auth_method from pg_hba_file_rules").fetchall()
        assert methods == [("scram-sha-256",)]
        assert connection.execute("show unix_socket_directories").fetchone() == ("",)
        assert connection.execute("show listen_addresses").fetchone() == ("127.0.0.1",)


def test_a_killed_postmaster_is_started_anew(embedded: EmbeddedPostgres) -> None:
    with connect(embedded.acquire()) as connection:
        connection.execute("create table if not exists kept (x int)")
    with psycopg.connect(embedded.url) as idle:
        postmaster = embedded.cluster.postmaster()
        assert postmaster is not None
        os.kill(postmaster.pid, signal.SIGKILL)
        # At once: its other processes have not noticed yet.
        with connect(embedded.acquire()) as connection:
            assert connection.execute("select count(*) from kept").fetchone() == (0,)
        idle.pgconn.finish()


@pytest.mark.parametrize("kind", ["zombie", "stranger", "nobody"])
def test_a_stale_pid_file_does_not_keep_it_from_starting(embedded: EmbeddedPostgres, kind: str) -> None:
    embedded.acquire()
    pid_file = embedded.data / "postmaster.pid"
    lines = pid_file.read_text().splitlines(keepends=True)
    embedded.stop()
    other = as_postgres_runs("sleep", "1000")
    try:
        if kind != "stranger":
            other.kill()
        if kind == "zombie":
            while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        if kind == "nobody":
            other.wait()
        pid_file.write_text("".join([f"{other.pid}\n", *lines[1:]]))
        if os.geteuid() == 0:
            shutil.chown(pid_file, USER)
        assert not embedded.running
        with connect(embedded.acquire()) as connection:
            assert connection.execute("select 1").fetchone() == (1,)
        if kind == "stranger":
            assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_old_logs_go(embedded: EmbeddedPostgres) -> None:
    embedded.acquire()
    logs = embedded.data / "logs"
    for day in range(10, 20):
        (logs / f"postgres-200001{day}-000000.log").write_text("old\n")
    embedded.acquire()
    kept = sorted(path.name for path in logs.glob("*.log"))
    assert len(kept) == KEPT_LOGS
    assert "postgres-20000110-000000.log" not in kept


def test_what_the_server_is_refused_is_not_written_down(embedded: EmbeddedPostgres) -> None:
    embedded.acquire()
    logs = embedded.data / "logs"
    size = sum(path.stat().st_size for path in logs.iterdir())
    with psycopg.connect(embedded.server_url, autocommit=True) as connection:
        for _ in range(20):
            with pytest.raises(psycopg.Error):
                connection.execute("select 'a long question that nobody understands' from nowhere")
    assert sum(path.stat().st_size for path in logs.iterdir()) == size


def test_the_servers_role_is_no_superuser(embedded: EmbeddedPostgres) -> None:
    embedded.acquire()
    with psycopg.connect(embedded.server_url) as connection:
        row = connection.execute("select rolsuper or rolcreaterole or rolcreatedb from pg_roles where rolname = user")
        assert row.fetchone() == (False,)


def test_a_database_whose_password_is_lost_is_never_made_again(embedded: EmbeddedPostgres) -> None:
    embedded.acquire()
    embedded.stop()
    password = embedded.directory / "password"
    text = password.read_text()
    password.unlink()
    try:
        with pytest.raises(UserError, match="its password file is missing"):
            embedded.acquire()
    finally:
        password.write_text(text)
    with connect(embedded.acquire()) as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_killed_in_its_first_start_it_is_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "postgres"
    # What earlier versions left behind: a cluster without a password, locked for ever.
    (directory / "data" / "base" / "1").mkdir(parents=True)
    (directory / "data" / "PG_VERSION").write_text("18\n")
    first = subprocess.Popen(
        [sys.executable, "-c", ACQUIRE, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    while not list(directory.glob("making-*/global")):
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert not (directory / "data").exists()
    server = EmbeddedPostgres(directory)
    try:
        with connect(server.acquire()) as connection:
            assert connection.execute("select 1").fetchone() == (1,)
        assert len(list(directory.glob("data.unfinished-*"))) == 1
    finally:
        server.stop()


def test_a_home_that_cannot_be_written_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        EmbeddedPostgres(tmp_path / "file" / "postgres").acquire()

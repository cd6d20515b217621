"""The embedded server: TCP with a password, shared by processes, stopped by the last one out."""

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from polytower.errors import UserError
from polytower.postgres import EmbeddedPostgres, connect


@pytest.fixture
def embedded(tmp_path: Path) -> EmbeddedPostgres:
    server = EmbeddedPostgres(tmp_path / "postgres")
    yield server
    server.stop()


def test_a_lease_starts_the_server_and_its_end_stops_it(embedded: EmbeddedPostgres) -> None:
    url = embedded.acquire()
    with connect(url) as connection:
        connection.execute("create table kept (x int)")
    embedded.release()
    assert not embedded.running
    with connect(embedded.acquire()) as connection:
        assert connection.execute("select count(*) from kept").fetchone() == (0,)
    embedded.release()


def test_the_server_stays_while_another_process_holds_a_lease(embedded: EmbeddedPostgres) -> None:
    script = (
        "import sys; from pathlib import Path; from polytower.postgres import EmbeddedPostgres;"
        "EmbeddedPostgres(Path(sys.argv[1])).acquire(); print('up', flush=True); sys.stdin.read()"
    )
    embedded.acquire()
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(embedded.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "up\n"
    embedded.release()
    assert embedded.running
    # Killed without a goodbye: the next one out notices that the lease is dead.
    other.kill()
    other.communicate()
    embedded.acquire()
    embedded.release()
    assert not embedded.running


def test_pinned_outlives_its_leases(embedded: EmbeddedPostgres) -> None:
    embedded.acquire()
    embedded.pin()
    embedded.release()
    assert embedded.running
    embedded.stop()
    assert not embedded.running


def test_nobody_gets_in_without_the_password(embedded: EmbeddedPostgres) -> None:
    url = embedded.acquire()
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(url.replace((embedded.directory / "password").read_text(), "wrong"))
    assert (embedded.directory / "password").stat().st_mode & 0o077 == 0


def test_a_taken_port_is_left_to_its_owner(embedded: EmbeddedPostgres, server: str) -> None:
    embedded.acquire()
    embedded.release()
    taken = psycopg.conninfo.conninfo_to_dict(server)["port"]
    (embedded.directory / "port").write_text(str(taken))
    with connect(embedded.acquire()) as connection:
        assert connection.info.port != int(taken)


def test_nothing_there_is_said_plainly() -> None:
    with pytest.raises(UserError, match="polytower doctor"), connect("postgresql://127.0.0.1:1/nothing"):
        pass

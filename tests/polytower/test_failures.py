"""Full disks, closed folders, a Postgres that dies: a message, status 1, nothing lost, and the next run goes on."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from polytower.embedded import EmbeddedPostgres
from polytower.errors import UserError
from polytower.failures import explained
from polytower.postgres import connect
from tests.factories import tiny_folder


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command on a home, with the embedded Postgres."""
    environment = {**os.environ, "POLYTOWER_HOME": str(home), "POLYTOWER_DEVICE": "cpu"}
    environment.pop("POLYTOWER_DATABASE_URL", None)
    command = [sys.executable, "-m", "polytower.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 24 MB, mounted on a folder."""
    folder = Path(tempfile.mkdtemp())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("needs the right to mount a tmpfs, which is absent here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
    folder.rmdir()


def test_a_full_disk_and_a_read_only_home_are_told_and_the_next_run_goes_on(small_disk: Path) -> None:
    home = small_disk / "home"
    full = run(home, "init")
    assert full.returncode == 1
    assert "No space left on device" in full.stderr
    assert "Traceback" not in full.stderr
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    closed = run(home, "init")
    assert closed.returncode == 1
    assert "POLYTOWER_HOME" in closed.stderr
    assert "Traceback" not in closed.stderr
    subprocess.run(["mount", "-o", "remount,rw,size=400m", small_disk], check=True)
    assert run(home, "init").returncode == 0


def test_a_disk_that_fills_up_under_a_checkpoint_is_told_and_the_older_one_stays(small_disk: Path) -> None:
    import torch

    from encoders.training.checkpoint import read_tensors, write_tensors

    file = small_disk / "towers.safetensors"
    write_tensors(file, {"x": torch.ones(4)})
    with pytest.raises(Exception, match="No space left") as failure:
        write_tensors(file, {"x": torch.ones(10_000_000)})
    assert "free some space" in (explained(failure.value) or "")
    assert read_tensors(file)["x"].tolist() == [1.0] * 4


def killed_under(server: EmbeddedPostgres, table: str, *arguments: str) -> str:
    """Runs a command, kills Postgres when the command waits for the table, and answers what the command said."""
    home = server.directory.parent
    # The command waits for this lock, so that it is in the middle of its work when Postgres dies.
    with psycopg.connect(server.acquire()) as blocker:
        blocker.execute(sql.SQL("lock table {} in access exclusive mode").format(sql.Identifier("polytower", table)))
        environment = {**os.environ, "POLYTOWER_HOME": str(home), "POLYTOWER_DEVICE": "cpu"}
        environment.pop("POLYTOWER_DATABASE_URL", None)
        command = subprocess.Popen(
            [sys.executable, "-m", "polytower.cli", *arguments], env=environment, stderr=subprocess.PIPE, text=True
        )
        waiting = "select count(*) from pg_locks where relation = %s::regclass and not granted"
        while blocker.execute(waiting, [f"polytower.{table}"]).fetchone() == (0,):
            assert command.poll() is None
            time.sleep(0.05)
        postmaster = server.cluster.postmaster()
        assert postmaster is not None
        os.kill(postmaster.pid, signal.SIGKILL)
        _, said = command.communicate(timeout=200)
        blocker.pgconn.finish()
    assert command.returncode == 1, said
    assert "Traceback" not in said
    return said


@pytest.mark.timeout(900)  # five commands in processes of their own, two of which import all of Dagster
def test_postgres_dying_under_a_command_is_told_and_the_next_run_goes_on(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tiny_folder(tmp_path / "data")
    server = EmbeddedPostgres(home / "postgres")
    try:
        assert run(home, "init").returncode == 0
        assert "nothing of this load was kept" in killed_under(server, "interactions", "load", str(folder))
        assert run(home, "load", str(folder)).returncode == 0
        sequences = ["materialize", "--until", "sequences"]
        assert "connection to Postgres was lost" in killed_under(server, "user_sequences", *sequences)
        assert run(home, *sequences).returncode == 0
        with connect(server.acquire()) as connection:
            assert connection.execute("select count(*) > 0 from user_sequences").fetchone() == (True,)
        # Histories, logs and passwords are nobody else's to read.
        assert not [path for path in home.rglob("*") if path.lstat().st_mode & 0o077 and not path.is_symlink()]
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("in words"), "in words"),
        (OSError(errno.ENOSPC, "No space left on device", "x.safetensors"), "no space left for x.safetensors"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x cannot be used"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left"),
        (psycopg.errors.AdminShutdown("terminating connection"), "connection to Postgres was lost"),
        (psycopg.OperationalError("server closed the connection unexpectedly"), "connection to Postgres was lost"),
        (psycopg.errors.DiskFull("could not extend file"), "Postgres has no space left"),
        (psycopg.errors.SyntaxError("our own fault"), None),
        (ValueError("our own fault"), None),
    ],
)
def test_surroundings_are_told_and_our_own_faults_are_not_hidden(error: Exception, said: str | None) -> None:
    try:
        raise RuntimeError("a step failed") from error
    except RuntimeError as wrapped:
        found = explained(wrapped)
    assert (found is None) if said is None else (said in (found or ""))

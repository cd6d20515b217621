"""What its surroundings do to a command is a message and exit status 1: folders, disks, Dagster's files, Postgres."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, text

from polytower.errors import UserError
from polytower.failures import explained
from polytower.postgres import connect


def told(error: BaseException) -> str:
    found = explained(error)
    assert found is not None
    return found


@pytest.mark.parametrize("command", [["init"], ["materialize", "--until", "sequences"]])
def test_a_home_that_cannot_be_written(platform: str, command: list[str]) -> None:
    environment = {**os.environ, "POLYTOWER_HOME": "/dev/null/home"}
    if command == ["init"]:
        del environment["POLYTOWER_DATABASE_URL"]
    done = subprocess.run(
        [sys.executable, "-m", "polytower.cli", *command],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: /dev/null/home" in done.stderr
    assert "set POLYTOWER_HOME to a folder you own" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("index", ["another's", "damaged"])
def test_dagsters_index_is_anothers_or_damaged(platform: str, tmp_path: Path, index: str) -> None:
    from pipelines.orchestration.instance import in_process_instance

    file = tmp_path / "home" / "dagster" / "history" / "runs" / "index.db"
    file.parent.mkdir(parents=True)
    if index == "damaged":
        file.write_bytes(b"this is no database" * 1000)
    else:
        file.symlink_to("/nowhere/index.db")
    with pytest.raises(Exception, match=r"sqlite3|index") as caught, in_process_instance() as instance:
        instance.get_latest_materialization_event(dg_key("checkpoint"))
    assert told(caught.value).startswith(f"Dagster's files in {tmp_path / 'home' / 'dagster'} cannot be used: ")
    assert "move" in told(caught.value)


def dg_key(name: str) -> Any:
    import dagster as dg

    return dg.AssetKey(name)


def test_a_disk_that_is_full() -> None:
    with pytest.raises(OSError, match="space") as caught:
        Path("/dev/full").write_text("x")
    assert told(caught.value).startswith("no space left for ")


def test_a_postgres_that_goes_away(database: str, connection: psycopg.Connection[Any]) -> None:
    end = "select pg_terminate_backend(pg_backend_pid())"
    with pytest.raises(psycopg.OperationalError) as caught, connect(database) as own:
        own.execute(end)
    lost = "the connection to Postgres was lost: terminating connection due to administrator command; finished work"
    assert told(caught.value).startswith(lost)
    engine = create_engine(database.replace("postgresql://", "postgresql+psycopg://"))
    with pytest.raises(Exception, match="terminating") as wrapped, engine.connect() as opened:
        opened.execute(text(end))
    engine.dispose()
    assert told(wrapped.value).startswith(lost)
    assert "Postgres has no space left: no space" in told(psycopg.errors.DiskFull("no space"))


def test_the_reason_behind_a_refusal_is_told() -> None:
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("a step failed") from UserError("lower the rate")
    assert told(caught.value) == "lower the rate"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        OSError(errno.ENOENT, "No such file", "x"),
        psycopg.errors.SyntaxError("near"),
        psycopg.errors.QueryCanceled("statement timeout"),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception) -> None:
    assert explained(error) is None

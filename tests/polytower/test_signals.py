"""SIGTERM and Ctrl-C: exit status 143 and 130, a message, no child, no lock left."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from polytower.commands.tools import _on_this_machine
from polytower.postgres import connect
from tests.factories import tiny_folder

ENDS = [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
# A tool that starts a program of its own, names both, and takes no notice of its end.
TOOL = """
import subprocess, sys, os
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(os.getpid(), child.pid, flush=True)
child.wait()
"""
COMMAND = """
import sys
from polytower.cli import cli, main
from polytower.commands import tools

@cli.command()
def tool():
    tools._run([sys.executable, "-c", sys.stdin.read()], {})

main()
"""


def started(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    # A job in a shell's background ignores Ctrl-C, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(("number", "status", "word"), ENDS)
def test_a_tool_and_its_children_end_with_the_command(number: int, status: int, word: str) -> None:
    process = started("-c", COMMAND, "tool", stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(TOOL)
    process.stdin.close()
    family = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    process.send_signal(number)
    assert process.wait(60) == status
    assert process.stderr is not None
    assert f"{word}; run the same command again" in process.stderr.read()
    assert not [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    process.stdout.close()
    process.stderr.close()


@pytest.fixture
def waiting(platform: str) -> Any:
    """Runs a command until it waits for an advisory lock of the given name, which the test holds."""

    @contextmanager
    def until_it_waits(lock: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
        with connect(platform, autocommit=True) as holder:
            holder.execute("select pg_advisory_lock(hashtextextended(%s, 0))", [lock])
            process = started("-m", "polytower.cli", *arguments)
            wait_until(holder, "select exists (select from pg_locks where locktype = 'advisory' and not granted)")
            yield process
            wait_until(
                holder,
                "select not exists (select from pg_stat_activity where datname = current_database()"
                " and pid <> pg_backend_pid() and backend_type = 'client backend')",
            )

    return until_it_waits


def wait_until(connection: psycopg.Connection[Any], question: str) -> None:
    """Asks until it holds; pytest's time-out is the bound."""
    while connection.execute(question).fetchone() != (True,):
        connection.execute("select pg_sleep(0.02)")


@pytest.mark.parametrize(("number", "status", "word"), ENDS)
def test_a_load_ends_and_gives_its_locks_back(
    waiting: Any, tmp_path: Path, number: int, status: int, word: str
) -> None:
    with waiting("polytower.load", "load", str(tiny_folder(tmp_path / "data"))) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=200)
    assert process.returncode == status
    assert f"{word}; run the same command again" in errors
    assert "Traceback" not in errors


def test_a_run_of_dagsters_ends_as_well(waiting: Any) -> None:
    with connect(os.environ["POLYTOWER_DATABASE_URL"]) as connection:
        connection.execute("select ensure_interactions_year(2024)")
        connection.execute("insert into items (item_id) values ('i')")
        connection.execute("insert into interactions (user_id, item_id, occurred_at) values ('u', 'i', '2024-01-01')")
    with waiting("polytower.sequences", "materialize", "--until", "sequences") as process:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 143
    assert "terminated; run the same command again" in errors
    assert "Traceback" not in errors


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(("number", "status", "word"), ENDS)
def test_a_server_ends(platform: str, number: int, status: int, word: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = started("-m", "polytower.cli", "serve", "--port", str(port))
    with connect(platform, autocommit=True) as connection:
        while not answers(port):
            connection.execute("select pg_sleep(0.02)")
    process.send_signal(number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == status
    assert f"{word}; run the same command again" in errors
    assert "Traceback" not in errors


def test_feasts_pages_are_for_this_machine_unless_told_otherwise() -> None:
    assert _on_this_machine(("ui", "--port", "1")) == ("ui", "--port", "1", "--host", "127.0.0.1")
    assert _on_this_machine(("ui", "-h", "0.0.0.0")) == ("ui", "-h", "0.0.0.0")
    assert _on_this_machine(("serve",)) == ("serve",)

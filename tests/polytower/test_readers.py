"""`polytower db reader`: what such a login reads, what it may not, and how it is renewed and removed."""

import json
import os
import subprocess
import sys

import psycopg
import pytest
from click.testing import CliRunner

from polytower.cli import cli
from polytower.postgres import connect
from polytower.readers import url_of

NAME = "analyst ü'\"x"


def _run(*line: str) -> str:
    done = CliRunner().invoke(cli, ["db", "reader", *line], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()[-1]


def test_a_reader_reads_with_limits_until_it_is_dropped(platform: str) -> None:
    url = json.loads(_run(NAME, "--timeout", "7", "--connections", "2", "--json"))["url"]
    try:
        with psycopg.connect(url) as first, psycopg.connect(url) as second:
            assert first.execute("select count(*) from items").fetchone() == (0,)
            settings = "select current_setting('statement_timeout'), current_setting('default_transaction_read_only')"
            assert second.execute(settings).fetchone() == ("7s", "on")
            with pytest.raises(psycopg.OperationalError, match="too many connections"):
                psycopg.connect(url)
            second.rollback()
            second.execute("set transaction read write")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                second.execute("delete from items")
        renewed = _run(NAME, "--renew")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(url)
        with psycopg.connect(renewed) as connection:
            assert connection.execute("show statement_timeout").fetchone() == ("5min",)
        with pytest.raises(Exception, match=r"there is a login .* already"):
            CliRunner().invoke(cli, ["db", "reader", NAME], catch_exceptions=False)
    finally:
        _run(NAME, "--drop")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(renewed)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["postgres"], "the role postgres is no reader's login"),
        (["polytower_server"], "the role polytower_server is no reader's login"),
        (["x" * 64], "from 1 to 63 bytes"),
        (["nobody", "--drop"], "there is no login nobody"),
        (["nobody", "--renew"], "there is no login nobody"),
    ],
)
def test_other_roles_are_left_alone(platform: str, line: list[str], words: str) -> None:
    with pytest.raises(Exception, match=words):
        CliRunner().invoke(cli, ["db", "reader", *line], catch_exceptions=False)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://o:p@h:5/d", "postgresql://a%20b:s@h:5/d"),
        ("postgresql://o:p@h1:5,h2:6/d?sslmode=require", "postgresql://a%20b:s@/d?host=h1%2Ch2&port=5%2C6&sslmode=require"),
        ("host=/run/pg dbname=d user=o", "postgresql://a%20b:s@/d?host=%2Frun%2Fpg"),
    ],
)  # fmt: skip
def test_the_url_has_everything_but_the_owner(url: str, expected: str) -> None:
    found = psycopg.conninfo.conninfo_to_dict(url_of(url, "a b", "s"))
    assert found == psycopg.conninfo.conninfo_to_dict(expected)


def test_no_password_in_the_servers_activity(platform: str) -> None:
    url = _run("plain")
    password = psycopg.conninfo.conninfo_to_dict(url)["password"]
    with connect(platform) as connection:
        stored = connection.execute("select rolpassword from pg_authid where rolname = 'plain'").fetchone()
    assert stored is not None
    assert stored[0].startswith("SCRAM-SHA-256$")
    assert str(password) not in stored[0]
    _run("plain", "--drop")


def test_refusals_in_psql_are_without_inner_lines(platform: str) -> None:
    line = ["db", "psql", "-c", "select * from polytower.similar_items('x')"]
    done = subprocess.run(
        [sys.executable, "-m", "polytower.cli", *line],
        env={**os.environ, "POLYTOWER_DATABASE_URL": platform},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines() == ["ERROR:  no generation is live", "HINT:  build one and promote it"]

"""One embedded Postgres for the whole run; every test gets a migrated database of its own, cloned from a template."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

import migrations
from polytower.postgres import DATABASE, EmbeddedPostgres, connect
from polytower.url import parts

# Port of this run's server → URL by the HTTP server's role.
_LOGINS: dict[str, str] = {}
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


# Files whose tests start programs or servers of their own, train, or load a model: `make test-fast` leaves them out.
SLOW = {
    "test_blocks", "test_cli", "test_content", "test_decoders", "test_definitions", "test_distributed", "test_embedded",
    "test_evaluate", "test_experiment", "test_explained", "test_failures", "test_image", "test_managed",
    "test_modalities", "test_movielens", "test_postgres", "test_sentences", "test_signals", "test_table",
    "test_tame_feast", "test_text", "test_text_arrays", "test_train", "test_warm",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs Postgres shows it by its fixtures; `-m "not database"` leaves it out."""
    for item in items:
        if isinstance(item, pytest.Function) and "server" in item.fixturenames:
            item.add_marker("database")
        if item.path.stem in SLOW:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """URL of a server of this run's own (or of POLYTOWER_TEST_DATABASE_URL), with a migrated template database."""
    given = os.environ.get("POLYTOWER_TEST_DATABASE_URL")
    if given:
        yield given
        return
    home = Path(tempfile.mkdtemp(prefix="polytower-tests-"))
    embedded = EmbeddedPostgres(home / "postgres")
    try:
        url = embedded.acquire()
        _forget_crashes(url)
        migrations.upgrade(url)
        _LOGINS[parts(url)["port"]] = embedded.server_url
        yield url
    finally:
        embedded.stop()
        shutil.rmtree(home)


def _forget_crashes(url: str) -> None:
    """Nothing here outlives the server: without waiting for the disk, a clone of the template takes a third."""
    with psycopg.connect(url, autocommit=True) as admin:
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            admin.execute(sql.SQL("alter system set {} = off").format(sql.Identifier(setting)))
        admin.execute("select pg_reload_conf()")


def as_server(url: str) -> str:
    """The same database by the role that the HTTP server has; unchanged where there is none of the embedded server."""
    login = _LOGINS.get(parts(url).get("port", ""))
    return login.removesuffix(DATABASE) + parts(url)["dbname"] if login else url


@contextmanager
def cloned(server: str, name: str) -> Iterator[str]:
    """URL of an empty migrated database, cloned from the template and dropped after; the name is made unique."""
    name = f"{name}_{os.getpid()}"
    root = server.removesuffix(DATABASE) + "postgres"
    identifiers = {"name": sql.Identifier(name), "template": sql.Identifier(DATABASE)}
    with psycopg.connect(root, autocommit=True) as admin:
        admin.execute(sql.SQL("create database {name} template {template}").format(**identifiers))
    try:
        yield server.removesuffix(DATABASE) + name
    finally:
        with psycopg.connect(root, autocommit=True) as admin:
            admin.execute(sql.SQL("drop database {name} with (force)").format(**identifiers))


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty migrated database that this test owns."""
    with cloned(server, f"test_{abs(hash(request.node.nodeid)) % 10**10}") as url:
        yield url


@pytest.fixture
def platform(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same database as the platform's own: settings, command line and assets all use it. Yields the URL."""
    monkeypatch.setenv("POLYTOWER_DATABASE_URL", database)
    monkeypatch.setenv("POLYTOWER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POLYTOWER_DEVICE", "cpu")
    return database


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection]:
    """An open connection to the test's own database."""
    with connect(database) as opened:
        yield opened


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the checkout; tests that need it are skipped by name where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data (real data sets in the input contract's format), which is absent here")
    return SHARED_DATA

"""A Postgres of one's own: roles that may little, pgvector elsewhere, TLS by a private authority, PgBouncer."""

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from fastapi.testclient import TestClient
from psycopg import sql

import migrations
from feature_repo.schema import ITEMS, SERVER_ROLE
from pipelines.expectations import validate
from pipelines.generation import lifecycle
from pipelines.load.folder import load_folder
from polytower.commands.doctor import _rights
from polytower.errors import UserError
from polytower.postgres import connect
from serving.http.app import Caps, create_app
from tests.factories import tiny_folder
from tests.generation_factory import write_generation
from tests.managed import PASSWORD, Managed, authority, managed_server, pgbouncer
from tests.serving.conftest import small_data

EXTENSION = "create extension vector"
ELSEWHERE = (
    "create schema extensions", "create extension vector with schema extensions",
    "grant usage on schema extensions to {role}",
)  # fmt: skip
SCHEMAS = ("create schema polytower authorization {role}", "create schema feast authorization {role}")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
needs_pgbouncer = pytest.mark.skipif(
    shutil.which("pgbouncer") is None, reason="needs PgBouncer (apt-get install pgbouncer), which is absent here"
)


@pytest.fixture(scope="session")
def managed() -> Iterator[Managed]:
    """One for all tests here."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, which is absent here")
    with managed_server() as server:
        yield server


def test_init_names_what_an_administrator_has_to_run(managed: Managed, caplog: pytest.LogCaptureFixture) -> None:
    with managed.customer("asking") as url:
        with connect(url) as connection:
            found = _rights(connection)
        assert not found.ok
        assert "`create schema polytower authorization asking_customer;`" in found.remedy
        ran = []
        for _ in range(4):
            try:
                migrations.upgrade(url)
                break
            except UserError as error:
                (statement,) = re.findall("`(.*)`", str(error))
                ran.append(statement)
                with psycopg.connect(managed.at("asking"), autocommit=True) as admin:
                    admin.execute(statement)
        assert ran == [
            "create extension vector;",
            "create schema polytower authorization asking_customer;",
            "create schema feast authorization asking_customer;",
        ]
        told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(told) == 1
        assert "may not create roles" in told[0]
        caplog.clear()
        migrations.upgrade(url)
        assert not caplog.records, "told once"


def test_a_role_that_comes_later_gets_its_rights(managed: Managed) -> None:
    server = sql.Identifier(SERVER_ROLE)
    with managed.customer("later", EXTENSION, *SCHEMAS) as url, psycopg.connect(managed.root, autocommit=True) as root:
        migrations.upgrade(url)
        root.execute(sql.SQL("create role {}").format(server))
        try:
            migrations.upgrade(url)
            with connect(url) as connection:
                row = connection.execute("select has_table_privilege(%s, 'interactions', 'insert')", [SERVER_ROLE])
                assert row.fetchone() == (True,)
        finally:
            with psycopg.connect(managed.at("later"), autocommit=True) as admin:
                admin.execute(sql.SQL("drop owned by {}").format(server))
            root.execute(sql.SQL("drop role {}").format(server))


@needs_pgbouncer
def test_sessions_of_a_pooler_with_pgvector_elsewhere_do_everything(managed: Managed, tmp_path: Path) -> None:
    from feature_repo.store import apply, close, feature_store

    with managed.customer("pooled", *ELSEWHERE, *SCHEMAS) as direct, pgbouncer(direct, "session") as url:
        migrations.upgrade(url)
        with connect(url) as connection:
            load_folder(connection, tiny_folder(tmp_path / "data"), None)
            generation = write_generation(connection, small_data())
            lifecycle.listing(connection)
        assert not validate(url, ITEMS).blocking
        store = feature_store(url)
        try:
            apply(store)
            found = store.get_online_features(["user_stats:user_interactions"], [{"user_id": "nobody"}]).to_dict()
            assert found["user_interactions"] == [None]
        finally:
            close(store)
        with TestClient(create_app(url, caps=Caps(deadline=120, patience=60))) as client:
            answer = client.post("/v1/retrieve", json={"user_id": "ada", "k": 3}).json()
            assert answer["generation"] == generation
            assert len(answer["candidates"]) == 3
            event = {"user_id": "ada", "item_id": "i09"}
            assert client.post("/v1/interactions", json={"interactions": [event]}).status_code == 200
        with connect(url) as connection:
            assert len(connection.execute("select * from retrieve('ada', 3)").fetchall()) == 3


@needs_pgbouncer
def test_lent_transactions_are_refused(managed: Managed) -> None:
    with managed.customer("lent") as direct, pgbouncer(direct, "transaction") as url:
        with pytest.raises(UserError, match="session mode") as refusal, connect(url):
            pass
        assert "o'r" not in str(refusal.value)
    # What other tests do through sessions goes on.


def reach_everybody(url: str) -> None:
    """What connects by itself does: psycopg, alembic, Feast's registry, its two stores, Great Expectations, HTTP."""
    from feature_repo.store import apply, close, feature_store
    from feature_repo.stores.offline_store import _connect

    migrations.upgrade(url)
    store = feature_store(url)
    try:
        apply(store)
        with _connect(store.config.offline_store) as offline:
            offline.execute("select 1")
        store.get_online_features(["user_stats:user_interactions"], [{"user_id": "nobody"}])
    finally:
        close(store)
    assert validate(url, ITEMS).blocking  # there are no items; that it could look is the point
    with TestClient(create_app(url, caps=Caps(deadline=120))) as client:
        assert client.get("/v1/generations").status_code == 200


def test_hosts_and_options_reach_everybody(managed: Managed) -> None:
    """The first of two hosts is dead, and the search path of the user's own does not replace ours."""
    with managed.customer("hosts", EXTENSION, *SCHEMAS) as plain:
        url = plain.replace("postgresql://", "postgres://").replace("@localhost:", "@localhost:1,localhost:") + (
            "?target_session_attrs=read-write&options=-c%20work_mem%3D5MB%20-c%20search_path%3Dnowhere"
        )
        reach_everybody(url)
        with connect(url) as connection:
            assert connection.execute("show work_mem").fetchone() == ("5MB",)
            assert connection.execute("show search_path").fetchone() == ("polytower, public",)


@needs_pgbouncer
def test_a_private_authority_reaches_everybody(managed: Managed, tmp_path: Path) -> None:
    certificate = authority(tmp_path)
    with (
        managed.customer("secure", EXTENSION, *SCHEMAS) as direct,
        pgbouncer(direct, "session", tmp_path) as plain,
    ):
        with pytest.raises(UserError, match="root certificate"), connect(plain + "?sslmode=verify-full"):
            pass
        reach_everybody(f"{plain}?sslmode=verify-full&sslrootcert={certificate}&channel_binding=prefer")


def test_psql_gets_the_url_by_a_file(managed: Managed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The password is in no list of processes and in no environment."""
    with managed.customer("typed", EXTENSION, *SCHEMAS) as url:
        monkeypatch.setenv("POLYTOWER_DATABASE_URL", url)
        command = [sys.executable, "-m", "polytower.cli", "db", "psql", "-Atc"]
        show = "select current_user, current_setting('search_path')"
        done = subprocess.run([*command, show], capture_output=True, text=True, check=True)
        assert done.stdout == "typed_customer|polytower,public\n"
        look = "\\! tr '\\0' ' ' < /proc/$PPID/cmdline; cat /proc/$PPID/environ | tr '\\0' '\\n' | grep ^PG"
        seen = subprocess.run([*command, look], capture_output=True, text=True, check=True).stdout
        assert "psql" in seen
        assert PASSWORD not in seen

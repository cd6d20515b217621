"""Feast's own command line on feature_repo/, unchanged: apply, materialize-incremental, serve, ui."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import make_url

from feature_repo import definitions
from feature_repo.environment import feast_environment
from feature_repo.schema import ITEM, ITEM_ID, SERVICES, USER, USER_ID
from feature_repo.views import VIEWS
from polytower.errors import UserError
from tests.feature_repo import rows
from tests.feature_repo.conftest import Filled

REPOSITORY = Path(definitions.__file__).parent


def _feast(filled: Filled, *arguments: str) -> subprocess.Popen[str]:
    """`feast -c feature_repo …` from elsewhere, with the variables that `polytower env` prints."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("feast")), "-c", str(REPOSITORY), *arguments],
        env={**os.environ, **feast_environment(filled.url), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@dataclass(frozen=True)
class Server:
    """A Feast server that runs meanwhile."""

    url: str
    process: subprocess.Popen[str]

    def ready(self) -> str:
        """The URL, once the server says that it listens."""
        assert self.process.stdout is not None
        output = ""
        for line in self.process.stdout:
            output += line
            if "Application startup complete" in line:
                return self.url
        raise AssertionError(output)


@contextmanager
def _server(filled: Filled, command: str, *arguments: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with _feast(filled, command, "--host", "127.0.0.1", "--port", str(port), *arguments) as process:
        try:
            yield Server(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()
            process.communicate()


@pytest.fixture(scope="module")
def servers(filled: Filled) -> Iterator[tuple[str, str]]:
    """`feast serve` and `feast ui`, side by side since each takes ten seconds to import Feast."""
    with _server(filled, "serve", "--no-access-log") as serve, _server(filled, "ui") as ui:
        yield serve.ready(), ui.ready()


def test_feast_serve_answers_as_the_sdk_does(filled: Filled, servers: tuple[str, str]) -> None:
    entities = {USER_ID: ["u0", "nobody", rows.USERS[2]], ITEM_ID: ["i0", "i1", rows.ITEMS[3]]}
    answer = httpx.post(
        f"{servers[0]}/get-online-features", json={"feature_service": "ranker", "entities": entities}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    columns = dict(zip(answer.json()["metadata"]["feature_names"], answer.json()["results"], strict=True))
    expected: dict[str, list[Any]] = filled.store.get_online_features(
        features=filled.store.get_feature_service("ranker"), entity_rows=entities
    ).to_dict()
    assert {name: column["values"] for name, column in columns.items()} == expected
    assert columns["item_ids"]["statuses"] == ["PRESENT", "NOT_FOUND", "PRESENT"]


def test_feast_ui_shows_the_project(servers: tuple[str, str]) -> None:
    assert "html" in httpx.get(servers[1]).text
    assert "polytower" in httpx.get(f"{servers[1]}/projects-list.json").text


def test_apply_and_materialize_incremental(writable: Filled) -> None:
    applied = writable.store.list_feature_views()
    for arguments in (["apply"], ["materialize-incremental", rows.day(100).isoformat()]):
        with _feast(writable, *arguments) as process:
            output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        if arguments == ["apply"]:
            writable.store.refresh_registry()
            assert writable.store.list_feature_views() == applied, "the command line finds what Python applied"
    writable.store.refresh_registry()
    ends = {view.name: view.most_recent_end_time for view in writable.store.list_feature_views()}
    assert ends == dict.fromkeys(VIEWS, rows.day(100))


def test_every_object_has_a_name_of_its_own(filled: Filled) -> None:
    """Feast overlooks what sits only inside a list: names in the module, declarations and the registry agree."""
    store = filled.store
    assert {view.name for view in store.list_feature_views()} == set(VIEWS)
    assert {entity.name for entity in store.list_entities()} >= {USER, ITEM}
    assert {service.name for service in store.list_feature_services()} == set(SERVICES)
    for name in (*VIEWS, *SERVICES, USER, ITEM):
        assert getattr(definitions, name).name == name


def test_feature_names_are_unique_within_the_services(filled: Filled) -> None:
    names = [field.name for view in filled.store.list_feature_views() for field in view.features]
    assert len(names) == len(set(names))


def test_the_environment_survives_odd_passwords() -> None:
    given = feast_environment("postgresql://me%40corp:p%22w%5C%20%24%2F@db.example:6432/plat%20form?sslmode=require")
    url, registry = (json.loads(f'"{given[f"POLYTOWER_FEAST_{name}"]}"') for name in ("URL", "REGISTRY"))
    assert conninfo_to_dict(url)["password"] == 'p"w\\ $/'
    parsed = make_url(registry)
    assert (parsed.username, parsed.password, parsed.database) == ("me@corp", 'p"w\\ $/', "plat form")
    assert parsed.query == {"host": "db.example", "port": "6432", "sslmode": "require"}


def test_a_url_without_a_host_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="names no host"):
        feast_environment("postgresql:///polytower")

"""The examples of docs/sql.md and docs/http.md run, and their tables are complete."""

import json
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fastapi.testclient import TestClient

from serving.errors import PROBLEMS
from serving.http.app import create_app
from tests.conftest import as_server
from tests.serving.conftest import PATIENT

DOCS = Path(__file__).parents[2] / "docs"


def _blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("statement", _blocks("sql.md", "sql"))
def test_sql_examples(documented: str, statement: str) -> None:
    refused = re.search(r"-- refused: (\w+)", statement)
    with psycopg.connect(documented) as connection:  # an analyst's own search path
        if refused is None:
            assert connection.execute(statement).fetchall()
            return
        with pytest.raises(psycopg.Error) as error:
            connection.execute(statement)
        assert error.value.sqlstate == refused[1]


@pytest.mark.parametrize("example", _blocks("http.md", "http"))
def test_http_examples(documented: str, text_encoder: str, monkeypatch: pytest.MonkeyPatch, example: str) -> None:
    monkeypatch.setenv("POLYTOWER_TEXT_ENCODER", text_encoder)
    monkeypatch.setenv("POLYTOWER_DEVICE", "cpu")
    line, _, body = example.partition("\n")
    method, path = line.split()
    with TestClient(create_app(as_server(documented), caps=PATIENT)) as client:
        answer = client.request(method, path, json=json.loads(body) if body else None)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert all(found[name] for name in found.keys() & {"candidates", "items", "interests", "accepted"})
    assert found.get("skipped", []) == (["never-heard-of"] if "never-heard-of" in example else [])


def test_feature_example_is_a_request() -> None:
    from serving.models import FeaturesRequest

    (example,) = _blocks("http.md", "json")
    assert FeaturesRequest.model_validate_json(example).service == "ranker"


def test_error_table() -> None:
    rows = re.findall(r"^\| `(PT\d+)` \| ([\w-]+) \|", (DOCS / "sql.md").read_text(), flags=re.MULTILINE)
    assert rows == [(state, kind.slug) for state, kind in PROBLEMS.items()]


def test_endpoint_table(documented: str) -> None:
    paths = create_app(as_server(documented)).openapi()["paths"].keys()
    document = (DOCS / "http.md").read_text()
    assert [path for path in paths if f"{path}`" not in document] == []

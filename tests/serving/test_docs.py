"""The examples of docs/sql.md and docs/http.md run, and their tables are complete."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from fastapi.testclient import TestClient
from psycopg.types.json import Jsonb

from encoders.catalogue import Catalogue
from encoders.checkpoint import content_tower_bytes, user_tower_bytes
from encoders.config import TowersConfig
from encoders.content_encoders import CONTENT_ENCODERS
from encoders.towers import Towers
from polytower.postgres import connect
from serving.app import Caps, create_app
from serving.errors import PROBLEMS
from tests.conftest import cloned
from tests.encoders.checkpoints import bert
from tests.generation_factory import Synthetic, unit, write_generation

DOCS = Path(__file__).parents[2] / "docs"


def _blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint in the place of MiniLM."""
    return str(bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def documented(server: str, text_encoder: str) -> Iterator[str]:
    """URL of a database with the ids and attributes that the examples name, and the towers."""
    random = np.random.default_rng(5)
    item_ids = [str(n) for n in range(1, 101)]
    data = Synthetic(
        item_ids,
        unit(random.standard_normal((100, 8))),
        {user: unit(random.standard_normal((4, 8))) for user in ("196", "186")},
        attributes=[{"genres": [["Comedy", "Drama", "War"][n % 3]], "year": 1950 + n} for n in range(100)],
        seen={"196": ["1", "2"], "186": ["3"]},
    )
    torch.manual_seed(0)
    encoder = CONTENT_ENCODERS["text"](model=text_encoder, device="cpu")
    texts = np.ones((100, encoder.dim), np.float32)
    catalogue = Catalogue(item_ids, {"text": texts}, {"text": np.ones(100, bool)})
    towers = Towers(TowersConfig(dim=8, interests=4, modalities=catalogue.modalities), catalogue)
    content = content_tower_bytes(towers)
    assert content is not None
    with cloned(server, "test_serving_docs") as url:
        with connect(url) as connection:
            write_generation(connection, data)
            connection.execute("update generations set config = %s", [Jsonb({"encoders": {"text": encoder.revision}})])
            for part, (weights, config) in {"user_tower": user_tower_bytes(towers), "content": content}.items():
                connection.execute(
                    "insert into towers (generation, part, weights, config) values (1, %s, %s, %s)",
                    [part, weights, Jsonb(config)],
                )
        yield url


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
    with TestClient(create_app(documented, caps=Caps(deadline=120))) as client:
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
    paths = create_app(documented).openapi()["paths"].keys()
    document = (DOCS / "http.md").read_text()
    assert [path for path in paths if f"{path}`" not in document] == []

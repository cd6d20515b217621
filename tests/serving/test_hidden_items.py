"""An item hidden by a file of two columns is nowhere: every kind of question, in SQL and over HTTP, at once."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from pipelines.load.folder import load_folder
from polytower.postgres import connect
from serving.http.app import create_app
from tests.generation_factory import Synthetic
from tests.serving.conftest import PATIENT

STATEMENTS = [
    "select item_id from retrieve('ada', 60)",
    "select item_id from retrieve('ada', 60, '{{}}', allow => '{{{hidden},i10}}')",
    "select item_id from similar_items('i04', 60)",
    "select item_id from nearest('{vector}', 60)",
]


def hide(url: str, folder: Path, item_id: str, available: str = "false") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "items.csv").write_text(f"item_id,available\n{item_id},{available}\n")
    with connect(url) as connection:
        load_folder(connection, folder)


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return [row["item_id"] for row in body.get("candidates", body.get("items", body.get("neighbours")))]


@pytest.mark.parametrize("warm", [False, True], ids=["sql", "memory"])
def test_a_hidden_item_is_nowhere(
    own: str, own_client: TestClient, small: Synthetic, tmp_path: Path, warm: bool
) -> None:
    hidden = "i20"
    vector = small.embedding[20].tolist()
    questions: list[dict[str, Any]] = [
        {"user_id": "ada", "k": 60},
        {"user_id": "ada", "k": 60, "allow": [hidden, "i10"]},
        {"user_id": "ada", "k": 60, "filter": {"year": {"gte": 1990}}},
        {"vectors": [vector], "k": 60},
    ]
    statements = [text.format(hidden=hidden, vector=vector) for text in STATEMENTS]

    def answers() -> list[list[str]]:
        if warm:
            assert own_client.portal is not None
            own_client.portal.call(own_client.app.state.services.index.settled)  # type: ignore[attr-defined]
        found = [ids(own_client.post("/v1/retrieve", json=question)) for question in questions]
        found.append(ids(own_client.get("/v1/items/i04/similar", params={"k": 60})))
        with connect(own) as connection:
            return found + [[row[0] for row in connection.execute(text).fetchall()] for text in statements]

    with connect(own) as connection:
        before = connection.execute("select title, attributes from items where item_id = %s", [hidden]).fetchone()
    assert all(hidden in found for found in answers())
    hide(own, tmp_path / "data", hidden)
    assert not any(hidden in found for found in answers())
    with connect(own) as connection:
        after = connection.execute("select title, attributes from items where item_id = %s", [hidden]).fetchone()
    assert after == before


def test_nor_is_it_found_by_text(
    documented: str, text_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYTOWER_TEXT_ENCODER", text_encoder)
    monkeypatch.setenv("POLYTOWER_DEVICE", "cpu")
    with TestClient(create_app(documented, caps=PATIENT)) as client:
        question = {"text": "a comedy", "k": 5}
        best = ids(client.post("/v1/retrieve", json=question))[0]
        try:
            hide(documented, tmp_path / "data", best)
            assert best not in ids(client.post("/v1/retrieve", json=question))
        finally:
            hide(documented, tmp_path / "data", best, "true")

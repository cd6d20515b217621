"""A running server forgets at once: from the next question on, whatever it holds in memory."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pipelines.forget import forget
from polytower.postgres import connect


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoints but this test's own."""
    monkeypatch.setenv("POLYTOWER_HOME", str(tmp_path))


def found(client: TestClient, **question: Any) -> list[str]:
    answer = client.post("/v1/retrieve", json={"k": 60, **question})
    assert answer.status_code == 200, answer.text
    return [row["item_id"] for row in answer.json()["candidates"]]


def test_a_forgotten_item_is_in_no_answer(own: str, own_client: TestClient) -> None:
    assert "i20" in found(own_client, user_id="ada")
    assert own_client.portal is not None
    own_client.portal.call(own_client.app.state.services.index.settled)  # type: ignore[attr-defined]
    assert "i20" in found(own_client, user_id="ada")
    with connect(own) as connection:
        forget(connection, "item", "i20")
    for _ in range(2):  # by SQL, and from the index that is loaded anew
        assert "i20" not in found(own_client, user_id="ada")
        own_client.portal.call(own_client.app.state.services.index.settled)  # type: ignore[attr-defined]
    assert own_client.get("/v1/items/i20/similar").status_code == 404


def test_a_forgotten_user_is_unknown_and_the_past_is_not_taken_again(own: str, own_client: TestClient) -> None:
    def post(**event: Any) -> Any:
        event = {"user_id": "ada", "item_id": "i01", **event}
        return own_client.post("/v1/interactions", json={"interactions": [event]}).json()

    assert found(own_client, user_id="ada")
    with connect(own) as connection:
        forget(connection, "user", "ada")
    assert own_client.post("/v1/retrieve", json={"user_id": "ada"}).status_code == 404
    assert post(occurred_at="2025-06-01T00:00:00Z")["accepted"] == 0
    assert own_client.post("/v1/retrieve", json={"user_id": "ada"}).status_code == 404
    assert post()["accepted"] == 1

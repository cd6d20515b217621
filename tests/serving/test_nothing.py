"""An answer without candidates says which condition left none."""

from typing import Any

import pytest
from fastapi.testclient import TestClient


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"filter": {"year": 1}}, "no available item matches the filter"),
        ({"filter": {"year": 1983}}, "no available item matches the filter"),  # i03 alone, which is not available
        ({"allow": ["nothing", "i03"]}, "of the 2 items in allow, generation 1 has none that is available"),
        ({"allow": []}, "of the 0 items in allow, generation 1 has none"),
        ({"allow": ["i01", "i02"]}, "all items that pass allow were seen before (exclude_seen)"),
        ({"allow": ["i10"], "exclude": ["i10"], "exclude_seen": False}, "all items that pass allow were excluded"),
        ({"allow": ["i10"], "filter": {"year": 1991}, "exclude_seen": False}, "or none passes the filter and allow"),
    ],
)
def test_an_empty_answer_says_why(client: TestClient, parts: dict[str, Any], words: str) -> None:
    body = client.post("/v1/retrieve", json={"user_id": "ada", **parts}).json()
    assert body["candidates"] == []
    assert words in body["degraded"]
    assert client.post("/v1/retrieve", json={"user_id": "ada", "k": 1}).json()["degraded"] is None

"""POST /v1/features: Feast's answer as JSON and as Arrow. What the values mean is tests/feature_repo's business."""

from collections.abc import Iterator

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from feature_repo.store import apply, close, feature_store
from serving.app import create_app

ARROW = "application/vnd.apache.arrow.stream"
QUESTION = {"service": "ranker", "entities": {"user_id": ["ada", "bob"], "item_id": ["i01", "gone"]}}


@pytest.fixture
def featured(own: str) -> Iterator[TestClient]:
    """A client of a server whose Feast registry is filled."""
    store = feature_store(own)
    apply(store)
    close(store)
    with TestClient(create_app(own), raise_server_exceptions=False) as client:
        yield client


def test_json_arrow_and_refusals(featured: TestClient) -> None:
    answer = featured.post("/v1/features", json=QUESTION)
    assert answer.status_code == 200, answer.text
    rows = answer.json()["rows"]
    assert [(row["user_id"], row["item_id"]) for row in rows] == [("ada", "i01"), ("bob", "gone")]
    assert rows[0]["title"] == "Title i01"
    assert rows[1]["title"] is None
    streamed = featured.post("/v1/features", json=QUESTION, headers={"accept": ARROW})
    assert streamed.headers["content-type"] == ARROW
    table = pa.ipc.open_stream(streamed.content).read_all()
    assert table.column_names == [*rows[0]]
    assert table["title"].to_pylist() == ["Title i01", None]
    for question, status, slug in (
        ({**QUESTION, "service": "nothing"}, 404, "unknown-service"),
        ({**QUESTION, "entities": {"planet": ["mars"]}}, 422, "unusable-entities"),
        ({**QUESTION, "entities": {"user_id": ["ada"], "item_id": ["i01", "i02"]}}, 422, "invalid-request"),
    ):
        refused = featured.post("/v1/features", json=question)
        assert (refused.status_code, refused.json()["type"]) == (status, f"/problems/{slug}"), refused.text

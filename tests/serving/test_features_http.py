"""POST /v1/features: a service's features as JSON and as Arrow. What they mean is tests/feature_repo's business."""

import pyarrow as pa
from fastapi.testclient import TestClient

ARROW = "application/vnd.apache.arrow.stream"
QUESTION = {"service": "ranker", "entities": {"user_id": ["ada", "bob"], "item_id": ["i01", "gone"]}}


def test_json_arrow_and_refusals(client: TestClient) -> None:
    answer = client.post("/v1/features", json=QUESTION)
    assert answer.status_code == 200, answer.text
    rows = answer.json()["rows"]
    assert [(row["user_id"], row["item_id"]) for row in rows] == [("ada", "i01"), ("bob", "gone")]
    assert rows[0]["title"] == "Title i01"
    assert rows[1]["title"] is None
    streamed = client.post("/v1/features", json=QUESTION, headers={"accept": ARROW})
    assert streamed.headers["content-type"] == ARROW
    table = pa.ipc.open_stream(streamed.content).read_all()
    assert table.column_names == [*rows[0]]
    assert table["title"].to_pylist() == ["Title i01", None]
    for question, status, slug in (
        ({**QUESTION, "service": "nothing"}, 404, "unknown-service"),
        ({**QUESTION, "entities": {"planet": ["mars"]}}, 422, "unusable-entities"),
        ({**QUESTION, "entities": {"user_id": ["ada"], "item_id": ["i01", "i02"]}}, 422, "invalid-request"),
    ):
        refused = client.post("/v1/features", json=question)
        assert (refused.status_code, refused.json()["type"]) == (status, f"/problems/{slug}"), refused.text

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


def test_candidates_and_their_features_in_one_call(client: TestClient) -> None:
    question = {"user_id": "ada", "k": 3, "features": "ranker", "similarity": True}
    body = client.post("/v1/retrieve", json=question)
    assert body.status_code == 200, body.text
    answer = body.json()
    items = [candidate["item_id"] for candidate in answer["candidates"]]
    alone = client.post(
        "/v1/features", json={"service": "ranker", "entities": {"user_id": ["ada"] * 3, "item_id": items}}
    ).json()["rows"]
    together = [
        {"item_id": candidate["item_id"], **answer["user_features"], **candidate["features"]}
        for candidate in answer["candidates"]
    ]
    assert together == alone
    assert answer["user_features"]["user_id"] == "ada"
    assert answer["candidates"][0]["features"].keys() >= {"title", "text_embedding", "embedding", "item_interactions"}
    assert answer["candidates"][0]["similarity"].keys() >= {"similarity_text", "interest_max"}
    arrow = client.post("/v1/retrieve", json=question, headers={"Accept": ARROW})
    table = pa.ipc.open_stream(arrow.content).read_all()
    assert table.select(["item_id", "embedding"]).to_pylist() == [
        {"item_id": row["item_id"], "embedding": row["embedding"]} for row in alone
    ]


def test_no_candidates_have_no_features(client: TestClient) -> None:
    everything = [f"i{n:02d}" for n in range(60)]
    answer = client.post("/v1/retrieve", json={"user_id": "ada", "exclude": everything, "features": "ranker"})
    assert (answer.status_code, answer.json()["candidates"]) == (200, [])


def test_questions_that_a_service_cannot_answer(client: TestClient) -> None:
    unknown = client.post("/v1/retrieve", json={"user_id": "ada", "features": "nothing"})
    assert (unknown.status_code, unknown.json()["type"]) == (404, "/problems/unknown-service")
    nobody = client.post("/v1/retrieve", json={"vectors": [[1.0] + [0.0] * 7], "features": "ranker"})
    assert (nobody.status_code, nobody.json()["type"]) == (422, "/problems/unusable-entities")
    userless = client.post("/v1/retrieve", json={"user_id": "ada", "features": "retrieval"})
    assert (userless.status_code, userless.json()["type"]) == (422, "/problems/unusable-entities")

"""The HTTP API over a real Postgres: what it answers when all is well."""

from fastapi.testclient import TestClient


def test_retrieve_by_user(client: TestClient, generation: int) -> None:
    answer = client.post("/v1/retrieve", json={"user_id": "ada", "k": 5, "fields": ["title"]})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["generation"], body["interests"], body["degraded"]) == (generation, "stored", None)
    assert [candidate["rank"] for candidate in body["candidates"]] == [1, 2, 3, 4, 5]
    assert all(c["title"] == f"Title {c['item_id']}" for c in body["candidates"])

"""The HTTP API over a real Postgres: what it answers when all is well."""

from typing import Any

import numpy as np
import psycopg
import pytest
from fastapi.testclient import TestClient

from polytower.postgres import connect
from serving.queries import Candidate, similar
from tests.generation_factory import Synthetic
from tests.serving.asking import retrieve


def _candidates(body: dict[str, Any]) -> list[Candidate]:
    candidates = []
    for row in body["candidates"]:
        columns = {
            "score": _score(row["score"]),
            "found_by": [by["interest"] for by in row["found_by"]],
            "found_ranks": [by["rank"] for by in row["found_by"]],
            "found_scores": [_score(by["score"]) for by in row["found_by"]],
        }
        candidates.append(Candidate(**{**row, **columns}, generation=body["generation"]))
    return candidates


def _score(written: float) -> float:
    """JSON has as many digits as tell 32-bit numbers apart."""
    return float(np.float32(written))


QUESTIONS: list[dict[str, Any]] = [
    {"k": 7},
    {"k": 1000, "exclude_seen": False},
    {"filter": {"genres": {"any": ["Comedy", "War"]}, "year": {"gte": 2000}}},
    {"merge": "quota", "k": 9},
    {"merge": "rrf", "exclude": ["i10", "i11"]},
]


@pytest.mark.parametrize("question", QUESTIONS, ids=str)
def test_http_agrees_with_sql(
    client: TestClient, connection: psycopg.Connection[Any], small: Synthetic, question: dict[str, Any]
) -> None:
    expected = retrieve(connection, "ada", **question)
    body = _ok(client.post("/v1/retrieve", json={"user_id": "ada", **question}))
    assert (body["generation"], body["interests"], body["degraded"], body["skipped"]) == (1, "stored", None, [])
    assert _candidates(body) == expected
    if question.get("exclude_seen") is False:
        vectors = [[float(np.float16(x)) for x in row] for row in small.interests["ada"]]
        given = {"vectors": vectors, "weights": small.weights["ada"], **question}
        answer = _ok(client.post("/v1/retrieve", json=given))
        assert answer["interests"] == "given"
        assert _candidates(answer) == expected


def test_who_found_a_candidate_can_be_left_out(client: TestClient) -> None:
    question = {"user_id": "ada", "k": 5}
    whole = _ok(client.post("/v1/retrieve", json=question))["candidates"]
    less = _ok(client.post("/v1/retrieve", json={**question, "found_by": False}))["candidates"]
    for each in whole:
        assert each.pop("found_by")
    assert less == whole


def test_titles(client: TestClient) -> None:
    body = _ok(client.post("/v1/retrieve", json={"user_id": "ada", "k": 5, "fields": ["title"]}))
    assert [c["title"] for c in body["candidates"]] == [f"Title {c['item_id']}" for c in body["candidates"]]


def test_batch(client: TestClient) -> None:
    questions = [
        {"user_id": "ada", "k": 3},
        {"user_id": "nobody"},
        {"user_id": "bob", "filter": {"gnere": 1}},
        {"user_id": "bob"},
    ]
    answers = _ok(client.post("/v1/retrieve:batch", json={"requests": questions}))["answers"]
    assert answers[0] == _ok(client.post("/v1/retrieve", json=questions[0]))
    assert [answer.get("status") for answer in answers] == [None, 404, 422, None]
    assert answers[1]["type"] == "/problems/unknown-user"
    assert answers[3] == _ok(client.post("/v1/retrieve", json=questions[3]))


@pytest.mark.parametrize("space", ["item", "content", "id"])
def test_similar(client: TestClient, connection: psycopg.Connection[Any], space: str) -> None:
    wanted = {"genres": "Comedy"}
    found = similar(connection, "i04", k=5, space=space, filter=wanted)
    body = _ok(client.get("/v1/items/i04/similar", params={"k": 5, "space": space, "filter": '{"genres": "Comedy"}'}))
    assert body == {
        "generation": 1,
        "space": space,
        "items": [{"item_id": n.item_id, "score": n.score, "rank": n.rank} for n in found],
    }


def test_interests(client: TestClient, small: Synthetic) -> None:
    body = _ok(client.get("/v1/users/ada/interests"))
    assert [row["interest"] for row in body["interests"]] == [0, 1, 2]
    np.testing.assert_allclose([row["embedding"] for row in body["interests"]], small.interests["ada"], atol=1e-3)


def test_generations(client: TestClient) -> None:
    (row,) = _ok(client.get("/v1/generations"))["generations"]
    assert (row["generation"], row["state"], row["dim"]) == (1, "live", 8)


def test_probes_and_metrics(client: TestClient) -> None:
    assert _ok(client.get("/healthz")) == {"status": "ok"}
    assert _ok(client.get("/readyz")) == {"status": "ready", "generation": 1}
    _ok(client.post("/v1/retrieve", json={"user_id": "ada"}))
    client.post("/v1/retrieve", json={"user_id": "nobody"})
    text = client.get("/metrics").text
    told = {line for line in text.splitlines() if not line.startswith("#") and "_bucket" not in line}
    assert told >= {
        'polytower_request_seconds_count{route="/v1/retrieve",status="200"} 1.0',
        'polytower_request_seconds_count{route="/v1/retrieve",status="404"} 1.0',
        'polytower_stage_seconds_count{stage="state"} 2.0',
        'polytower_stage_seconds_count{stage="search"} 1.0',
        'polytower_candidates_sum{interests="stored"} 56.0',
        'polytower_problems_total{type="unknown-user"} 1.0',
        "polytower_requests_in_flight 0.0",
    }


def test_openapi_has_examples(client: TestClient) -> None:
    document = _ok(client.get("/openapi.json"))
    assert {
        "/v1/retrieve",
        "/v1/retrieve:batch",
        "/v1/items/{item_id}/similar",
        "/v1/users/{user_id}/interests",
        "/v1/interactions",
        "/v1/features",
        "/v1/generations",
        "/healthz",
        "/readyz",
        "/metrics",
    } == document["paths"].keys()
    for name in ("RetrieveRequest", "BatchRequest", "InteractionsRequest", "FeaturesRequest"):
        assert document["components"]["schemas"][name]["examples"], name
    problem = document["paths"]["/v1/retrieve"]["post"]["responses"]["404"]["content"]
    assert "application/problem+json" in problem


def test_interactions_are_idempotent(own_client: TestClient, own: str) -> None:
    events = [
        {"user_id": "ada", "item_id": "i20", "occurred_at": "2026-03-01T12:00:00Z", "event_id": "e1", "value": 4.5},
        {"user_id": "new", "item_id": "i21", "event_id": "e2", "query": "war"},
        {"user_id": "ada", "item_id": "i22", "occurred_at": "2026-03-01T12:00:00Z"},
    ]
    post = {"interactions": events}
    assert _ok(own_client.post("/v1/interactions", json=post)) == {"accepted": 3, "duplicates": 0}
    assert _ok(own_client.post("/v1/interactions", json=post)) == {"accepted": 0, "duplicates": 3}
    assert _ok(own_client.post("/v1/interactions", json={"interactions": events * 2})) == {
        "accepted": 0,
        "duplicates": 6,
    }
    with connect(own) as connection:
        rows = connection.execute(
            "select item_id, kind, event_id, value, query from interactions"
            " where occurred_at > '2026-01-02' order by item_id"
        ).fetchall()
        days = connection.execute("select count(distinct day) from changed_days where day > '2026-01-02'").fetchone()
    assert rows == [
        ("i20", "interaction", "e1", 4.5, None),
        ("i21", "interaction", "e2", None, "war"),
        ("i22", "interaction", "", None, None),
    ]
    assert days == (2,)


def _ok(response: Any) -> Any:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()

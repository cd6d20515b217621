"""Interests computed now: a raw history, a user whose newest events the generation does not know."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from fastapi.testclient import TestClient
from psycopg.types.json import Jsonb

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig
from encoders.towers.model import Context
from encoders.towers.towers import Towers, UserTower
from encoders.training.checkpoint import user_tower_bytes
from pipelines.generation.lifecycle import amends
from polytower.postgres import connect
from serving.http.app import create_app
from tests.conftest import as_server
from tests.generation_factory import Synthetic
from tests.serving.conftest import PATIENT
from tests.serving.reference import interest_lists, merge_max


@pytest.fixture
def towers(small: Synthetic) -> Towers:
    """Untrained towers of the synthetic generation's width."""
    torch.manual_seed(0)
    catalogue = Catalogue(list(small.item_ids), {"text": np.ones((60, 4), np.float32)}, {"text": np.ones(60, bool)})
    return Towers(TowersConfig(dim=8, interests=3, modalities=catalogue.modalities), catalogue).eval()


@pytest.fixture
def online(own: str, towers: Towers) -> Iterator[TestClient]:
    """A client of a server whose generation brings a user tower."""
    with connect(own) as connection:
        _store(connection, towers)
    with TestClient(create_app(as_server(own), caps=PATIENT), raise_server_exceptions=False) as client:
        yield client


def _store(connection: psycopg.Connection[Any], towers: Towers) -> None:
    weights, config = user_tower_bytes(towers)
    connection.execute(
        "insert into towers (generation, part, weights, config) values (1, 'user_tower', %s, %s)",
        [weights, Jsonb(config)],
    )


def _expected(
    small: Synthetic, tower: UserTower, history: list[str], seen: set[str], k: int, times: list[int] | None = None
) -> list[tuple[str, int]]:
    halves = small.embedding.astype(np.float16).astype(np.float32)
    rows = torch.from_numpy(halves[[small.item_ids.index(item_id) for item_id in history]])[None]
    with torch.inference_mode():
        when = Context(None if times is None else torch.tensor([times]))
        found = tower.interests(rows, torch.ones(1, len(history), dtype=torch.bool), when)
    interests = found.vectors[0].numpy().astype(np.float16).astype(np.float32)
    qualifies = [item_id not in seen | small.unavailable for item_id in small.item_ids]
    merged = merge_max(interest_lists(small.item_ids, halves, interests, qualifies, k), [1] * len(interests), k)
    return [(row.item_id, row.interest) for row in merged]


def _ask(client: TestClient, **question: Any) -> dict[str, Any]:
    answer = client.post("/v1/retrieve", json=question)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def _found(body: dict[str, Any]) -> list[tuple[str, int]]:
    return [(row["item_id"], row["interest"]) for row in body["candidates"]]


def test_a_new_user_from_a_raw_history(online: TestClient, small: Synthetic, towers: Towers) -> None:
    history = ["i10", "i20", "i11", "i20"]
    body = _ask(online, history=["unknown", *history, "gone"], k=10)
    assert (body["interests"], body["skipped"], body["degraded"]) == ("online", ["unknown", "gone"], None)
    assert _found(body) == _expected(small, towers.user_tower, history, {*history}, 10)
    assert _found(_ask(online, history=history, k=10, exclude_seen=False)) == _expected(
        small, towers.user_tower, history, set(), 10
    )


def test_order_matters_and_only_the_newest_events_count(online: TestClient) -> None:
    one, other = _ask(online, history=["i10", "i20"], k=20), _ask(online, history=["i20", "i10"], k=20)
    assert [row["score"] for row in one["candidates"]] != [row["score"] for row in other["candidates"]]
    newest = [f"i{n % 60:02d}" for n in range(200)]
    long = _ask(online, history=["i59"] * 300 + newest, k=5, exclude_seen=False)
    assert long["candidates"] == _ask(online, history=newest, k=5, exclude_seen=False)["candidates"]


def test_an_interaction_posted_now_changes_the_next_answer(
    online: TestClient, small: Synthetic, towers: Towers
) -> None:
    before = _ask(online, user_id="ada", k=10)
    assert before["interests"] == "stored"
    target = before["candidates"][0]["item_id"]
    posted = online.post("/v1/interactions", json={"interactions": [{"user_id": "ada", "item_id": target}]})
    assert posted.status_code == 200, posted.text
    after = _ask(online, user_id="ada", k=10)
    history = [*small.seen["ada"], target]
    assert after["interests"] == "online"
    assert _found(after) == _expected(small, towers.user_tower, history, {*history}, 10)


def test_a_user_without_stored_interests(online: TestClient, small: Synthetic, towers: Towers) -> None:
    online.post("/v1/interactions", json={"interactions": [{"user_id": "new", "item_id": i} for i in ("i30", "i31")]})
    body = _ask(online, user_id="new", k=5)
    assert (body["interests"], body["generation"]) == ("online", 1)
    assert _found(body) == _expected(small, towers.user_tower, ["i30", "i31"], {"i30", "i31"}, 5)


def test_a_tower_that_reads_time_gets_the_times_of_the_events(own: str, small: Synthetic, towers: Towers) -> None:
    torch.manual_seed(0)
    timed = UserTower(replace(towers.config, relative="time", blocks=2, modalities=())).eval()
    for parameter in timed.parameters():
        parameter.data += torch.randn_like(parameter)
    towers = Towers(replace(towers.config, relative="time", blocks=2, modalities=()), Catalogue(["a"]))
    towers.user_tower = timed
    with connect(own) as connection:
        _store(connection, towers)
    days = {"i30": "2024-01-01", "i31": "2024-01-02", "i10": "2024-03-01", "i12": "2024-03-01"}
    events = [{"user_id": "new", "item_id": i, "occurred_at": f"{day}T00:00:00Z"} for i, day in days.items()]
    with TestClient(create_app(as_server(own), caps=PATIENT), raise_server_exceptions=False) as client:
        assert client.post("/v1/interactions", json={"interactions": events}).status_code == 200
        found, raw = _ask(client, user_id="new", k=10), _ask(client, history=list(days), k=10)
    times = [int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp() * 1e6) for day in days.values()]
    assert _found(found) == _expected(small, timed, list(days), {*days}, 10, times)
    assert _found(raw) == _expected(small, timed, list(days), {*days}, 10)
    assert [row["score"] for row in found["candidates"]] != [row["score"] for row in raw["candidates"]]


def test_without_a_tower_the_answer_says_that_it_is_stale(own_client: TestClient) -> None:
    own_client.post("/v1/interactions", json={"interactions": [{"user_id": "ada", "item_id": "i30"}]})
    body = _ask(own_client, user_id="ada", k=5)
    assert body["interests"] == "stored"
    assert "brings no user tower" in body["degraded"]
    assert "i30" not in {row["item_id"] for row in body["candidates"]}


def test_damaged_tower(own: str, own_client: TestClient, towers: Towers) -> None:
    with connect(own) as connection:
        _store(connection, towers)
        amends(connection)
        connection.execute("update towers set weights = 'no safetensors'")
    answer = own_client.post("/v1/retrieve", json={"history": ["i01"]})
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/no-user-tower")


def test_batch_of_histories(online: TestClient) -> None:
    questions = [{"history": ["i10"], "k": 3}, {"history": ["i11", "i12"], "k": 3}, {"history": ["unknown"]}]
    answers = online.post("/v1/retrieve:batch", json={"requests": questions}).json()["answers"]
    assert answers[0] == _ask(online, **questions[0])
    assert answers[1] == _ask(online, **questions[1])
    assert answers[2]["type"] == "/problems/unknown-history"


def _post(client: TestClient, *events: dict[str, Any]) -> None:
    posted = client.post("/v1/interactions", json={"interactions": [{"user_id": "ada", **event} for event in events]})
    assert posted.status_code == 200, posted.text


def test_a_late_event_counts_at_its_place_in_the_history(online: TestClient, small: Synthetic, towers: Towers) -> None:
    """Dated years before the newest event that the generation knows, and arrived after it was built."""
    assert _ask(online, user_id="ada", k=10)["interests"] == "stored"
    _post(online, {"item_id": "i30", "occurred_at": "2020-05-05T00:00:00Z"})
    body = _ask(online, user_id="ada", k=10)
    history = ["i30", *small.seen["ada"]]
    assert (body["interests"], body["degraded"]) == ("online", None)
    assert _found(body) == _expected(small, towers.user_tower, history, {*history}, 10)


def test_an_event_dated_ahead_freezes_nobody(online: TestClient, own: str, small: Synthetic, towers: Towers) -> None:
    """One that was taken before it was refused, and known to the generation: later events still count."""
    with connect(own) as connection:
        connection.execute("select ensure_interactions_year(2030)")
        connection.execute(
            "insert into interactions (user_id, item_id, occurred_at) values ('ada', 'i40', '2030-01-01')"
        )
        amends(connection)
        connection.execute("update user_interests set as_of = '2030-01-01', events = 4 where user_id = 'ada'")
    assert _ask(online, user_id="ada", k=10)["interests"] == "stored"
    _post(online, {"item_id": "i30"})
    body = _ask(online, user_id="ada", k=10)
    history = [*small.seen["ada"], "i30", "i40"]
    assert body["interests"] == "online"
    assert _found(body) == _expected(small, towers.user_tower, history, {*history}, 10)


@pytest.mark.parametrize(("ahead", "status"), [(200, 200), (400, 422)])
def test_how_far_ahead_an_event_may_be_dated(online: TestClient, ahead: int, status: int) -> None:
    moment = datetime.now(UTC) + timedelta(seconds=ahead)
    event = {"user_id": "ada", "item_id": "i30", "occurred_at": moment.isoformat()}
    answer = online.post("/v1/interactions", json={"interactions": [event]})
    assert answer.status_code == status
    assert status == 200 or "more than 300 s ahead" in answer.json()["detail"]


def test_an_answer_tells_of_events_that_it_could_not_take_into_account(online: TestClient, own: str) -> None:
    with connect(own) as connection:
        connection.execute("insert into items (item_id) values ('newer than the generation')")
    _post(online, {"item_id": "newer than the generation"}, {"item_id": "i30"})
    body = _ask(online, user_id="ada", k=5)
    assert (body["interests"], body["skipped"]) == ("online", ["newer than the generation"])
    assert "unknown to generation 1" in body["degraded"]


def test_a_generation_from_before_events_were_counted(online: TestClient, own: str) -> None:
    with connect(own) as connection:
        amends(connection)
        connection.execute("update user_interests set events = null")
    assert _ask(online, user_id="ada", k=5)["interests"] == "stored"
    _post(online, {"item_id": "i30"})
    assert _ask(online, user_id="ada", k=5)["interests"] == "online"

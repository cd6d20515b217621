"""Promotions all the while: every part of an answer is of the generation that the answer names."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from pipelines.generation import lifecycle
from polytower.postgres import connect
from serving.http.app import create_app
from tests.generation_factory import Synthetic, unit, write_generation
from tests.serving.conftest import PATIENT

ROUNDS = 60


@pytest.fixture
def data(small: Synthetic) -> dict[int, Synthetic]:
    """Generations 1 and 2: the same items and users, with other vectors."""
    random = np.random.default_rng(9)
    interests = {user: unit(random.standard_normal((3, 8))) for user in small.interests}
    return {1: small, 2: replace(small, embedding=unit(random.standard_normal((60, 8))), interests=interests)}


@pytest.fixture
def restless(own: str, data: dict[int, Synthetic]) -> Iterator[TestClient]:
    """A client of a server whose generations take turns without pause."""
    with connect(own) as connection:
        assert write_generation(connection, data[2], live=False) == 2
        lifecycle.promote(connection, 2)
    done = threading.Event()

    def promote() -> None:
        with connect(own) as connection:
            while not done.is_set():
                for generation in data:
                    lifecycle.promote(connection, generation)

    thread = threading.Thread(target=promote)
    thread.start()
    try:
        with TestClient(create_app(own, caps=PATIENT), raise_server_exceptions=False) as client:
            yield client
    finally:
        done.set()
        thread.join()


def _closest(data: Synthetic, item_id: str) -> float:
    item = data.embedding[data.item_ids.index(item_id)].astype(np.float16).astype(np.float32)
    return float((data.interests["ada"].astype(np.float16).astype(np.float32) @ item).max())


def _check(data: dict[int, Synthetic], answer: dict[str, Any]) -> int:
    generation: int = answer["generation"]
    assert answer["user_features"]["interests_generation"] == generation
    for row in answer["candidates"]:
        assert row["features"]["embedding_generation"] == generation
        assert row["similarity"]["interest_max"] == pytest.approx(_closest(data[generation], row["item_id"]), abs=1e-5)
        assert row["score"] == pytest.approx(row["similarity"]["interest_max"], abs=1e-3)
    return generation


def test_candidates_features_and_similarities(restless: TestClient, data: dict[int, Synthetic]) -> None:
    question = {"user_id": "ada", "k": 5, "features": "ranker", "similarity": True}
    met = set()
    for _ in range(ROUNDS):
        answer = restless.post("/v1/retrieve", json=question)
        assert answer.status_code == 200, answer.text
        met.add(_check(data, answer.json()))
    assert met == {1, 2}


def test_all_answers_of_a_batch(restless: TestClient, data: dict[int, Synthetic]) -> None:
    question = {"user_id": "ada", "k": 5, "features": "ranker", "similarity": True}
    for _ in range(ROUNDS // 5):
        answers = restless.post("/v1/retrieve:batch", json={"requests": [question] * 4}).json()["answers"]
        assert len({_check(data, answer) for answer in answers}) == 1


def test_features_and_similarities_of_given_items(restless: TestClient, data: dict[int, Synthetic]) -> None:
    body = {
        "service": "ranker",
        "similarity": True,
        "entities": {"user_id": ["ada"] * 3, "item_id": ["i01", "i02", "i05"]},
    }
    for _ in range(ROUNDS):
        for row in restless.post("/v1/features", json=body).json()["rows"]:
            assert row["interests_generation"] == row["embedding_generation"]
            closest = _closest(data[row["embedding_generation"]], row["item_id"])
            assert row["interest_max"] == pytest.approx(closest, abs=1e-5)

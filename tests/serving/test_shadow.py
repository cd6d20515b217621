"""Sampled exact shadow queries: taken seldom, exported, and never in anybody's way."""

import asyncio
from typing import Any

import numpy as np
import psycopg

from serving import queries
from serving.database import Database
from serving.metrics import ServerMetrics
from serving.question import Interests, Question
from serving.retrieve.shadow import Shadow
from tests.serving.asking import retrieve


def _parameters(connection: psycopg.Connection[Any], k: int) -> dict[str, Any]:
    interests = connection.execute("select array_agg(embedding) from user_interests('ada')").fetchone()
    assert interests is not None
    vectors = [vector.to_numpy() for vector in interests[0]]
    question = Question(user_id="ada", k=k)
    return queries.search_parameters(question, Interests("stored", vectors, None, range(3)), None, exact=True)


def _recalls(metrics: ServerMetrics) -> list[str]:
    lines = metrics.exposition().decode().splitlines()
    return [
        line.split()[-1]
        for line in lines
        if line.startswith(("polytower_shadow_recall_count", "polytower_shadow_recall_sum"))
    ]


def test_recall_of_a_sample(served: str, connection: psycopg.Connection[Any]) -> None:
    found = retrieve(connection, "ada", k=8, exclude_seen=False)

    async def ask(answer: list[queries.Candidate], interval: float) -> list[str]:
        scores = np.array([row.score for row in answer], np.float32)
        metrics = ServerMetrics()
        database = Database(served, metrics, size=1, timeout=10)
        await database.open()
        shadow = Shadow(database, metrics, interval=interval)
        shadow.sample("memory", _parameters(connection, 8), scores)
        await shadow.settled()
        shadow.sample("memory", _parameters(connection, 8), scores)  # too soon after the first
        await shadow.settled()
        await database.close()
        return _recalls(metrics)

    worse = retrieve(connection, "ada", k=14, exclude_seen=False)[2:10]
    assert asyncio.run(ask(found, 0)) == ["1.0", "1.0"]
    assert asyncio.run(ask(worse, 0)) == ["1.0", "0.75"]
    assert asyncio.run(ask(found, 60)) == []


def test_postgres_away(connection: psycopg.Connection[Any]) -> None:
    found = retrieve(connection, "ada", k=3)

    async def ask() -> list[str]:
        metrics = ServerMetrics()
        database = Database("postgresql://nobody@127.0.0.1:1/nothing", metrics, size=1, timeout=0.2)
        await database.open()
        shadow = Shadow(database, metrics, interval=0)
        shadow.sample("memory", _parameters(connection, 3), [row.score for row in found])
        await shadow.settled()
        await database.close()
        return _recalls(metrics)

    assert asyncio.run(ask()) == []

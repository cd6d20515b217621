"""What runs on 24,000 items × 64: which index, how many results, and how near to exact. One database for all."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import psycopg
import pytest

from polytower.postgres import connect
from serving import queries
from serving.queries import Candidate
from serving.question import Question
from tests.conftest import cloned
from tests.generation_factory import Floats, Synthetic, clustered, create_indexes, write_generation
from tests.serving.asking import retrieve

ITEMS, DIM, USERS, K = 24_000, 64, 20, 100


@pytest.fixture(scope="module")
def large(server: str) -> Iterator[tuple[str, Synthetic]]:
    """(URL, data) of a database with one indexed generation."""
    data = _data()
    with cloned(server, "test_serving_plans") as url:
        with connect(url) as connection:
            generation = write_generation(connection, data, index=False)
            create_indexes(connection, generation, DIM, ("embedding",))
            connection.execute("analyze user_interests; analyze interactions")
        yield url, data


def _data() -> Synthetic:
    vectors, interests = clustered(3, ITEMS, DIM, USERS)
    random = np.random.default_rng(4)
    item_ids = [f"i{n:05d}" for n in range(ITEMS)]
    halves = vectors.astype(np.float16).astype(np.float32)
    seen = {}
    for user, rows in interests.items():
        nearest = np.unique(np.argsort(-(halves @ rows.T), axis=0)[:15])
        seen[user] = [item_ids[n] for n in [*nearest, *random.choice(ITEMS, 50, replace=False)]]
    return Synthetic(
        item_ids,
        vectors,
        interests,
        attributes=[{"rare": n % 50 == 0, "half": n % 2, "third": n % 3 == 0} for n in range(ITEMS)],
        unavailable=frozenset(item_ids[n] for n in random.choice(ITEMS, 200, replace=False)),
        seen=seen,
    )


@pytest.fixture
def large_connection(large: tuple[str, Synthetic]) -> Iterator[psycopg.Connection[Any]]:
    with connect(large[0]) as opened:
        yield opened


def _exact(data: Synthetic, user: str, allowed: np.ndarray[Any, Any], k: int = K) -> tuple[list[str], Floats]:
    """The k best item ids by max score over interests, and all scores [V] (−inf where not allowed)."""
    vectors = data.embedding.astype(np.float16).astype(np.float32)
    interests = data.interests[user].astype(np.float16).astype(np.float32)
    scores = np.where(allowed, (vectors @ interests.T).max(axis=1), -np.inf)
    return [data.item_ids[n] for n in np.argsort(-scores, kind="stable")[:k]], scores


def _allowed(data: Synthetic, user: str | None, attribute: str | None = None) -> np.ndarray[Any, Any]:
    seen = set(data.seen[user]) if user else set()
    attributes = data.attributes or []
    return np.array(
        [
            item_id not in data.unavailable and item_id not in seen and (attribute is None or bool(row[attribute]))
            for item_id, row in zip(data.item_ids, attributes, strict=True)
        ]
    )


def _recall(data: Synthetic, found: list[Candidate], user: str, attribute: str | None = None) -> float:
    expected, _ = _exact(data, user, _allowed(data, user, attribute), len(found))
    return len({row.item_id for row in found} & {*expected}) / len(expected)


def _scans(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """(sequential scans of the partition, scans of its HNSW index) in this transaction."""
    row = connection.execute(
        "select (select pg_stat_get_xact_numscans('item_embeddings_g1'::regclass)),"
        " pg_stat_get_xact_numscans('item_embeddings_g1_embedding_idx'::regclass)"
    ).fetchone()
    assert row is not None
    return row


@pytest.mark.parametrize("merge", ["max", "quota", "rrf", "soft"])
def test_walks_the_index_and_never_scans(large_connection: psycopg.Connection[Any], merge: str) -> None:
    for n in range(USERS):
        assert len(retrieve(large_connection, f"u{n}", k=K, merge=merge)) == K
    sequential, walks = _scans(large_connection)
    assert sequential == 0
    assert USERS * 4 <= walks <= USERS * 8


def test_recall_against_exact(large: tuple[str, Synthetic], large_connection: psycopg.Connection[Any]) -> None:
    recalls = [_recall(large[1], retrieve(large_connection, f"u{n}", k=K), f"u{n}") for n in range(USERS)]
    assert np.mean(recalls) >= 0.97, recalls


def test_provenance(large: tuple[str, Synthetic], large_connection: psycopg.Connection[Any]) -> None:
    data = large[1]
    for row in retrieve(large_connection, "u3", k=K):
        vector = data.embedding[int(row.item_id[1:])].astype(np.float16).astype(np.float32)
        scores = data.interests["u3"].astype(np.float16).astype(np.float32) @ vector
        assert row.interest == scores.argmax()
        assert row.score == pytest.approx(scores.max(), abs=1e-5)


@pytest.mark.parametrize("attribute", ["half", "third", "rare"])
def test_filters_fill_k(
    large: tuple[str, Synthetic], large_connection: psycopg.Connection[Any], attribute: str
) -> None:
    wanted = {attribute: 1 if attribute == "half" else True}
    recalls = []
    for n in range(USERS):
        found = retrieve(large_connection, f"u{n}", k=K, filter=wanted)
        assert len(found) == K
        recalls.append(_recall(large[1], found, f"u{n}", attribute))
    # 2 % of the catalogue is scanned: exact. Half of it is walked: as good as without a filter.
    assert np.mean(recalls) == 1 if attribute == "rare" else np.mean(recalls) >= 0.97


def test_fewer_than_k_qualify(large: tuple[str, Synthetic], large_connection: psycopg.Connection[Any]) -> None:
    data = large[1]
    keep = {f"i{n:05d}" for n in range(0, ITEMS, 400)}
    banned = [item_id for item_id in data.item_ids if item_id not in keep]
    # more than a question may name: model_construct checks nothing
    found = queries.retrieve(large_connection, Question.model_construct(user_id="u1", k=K, exclude=banned))
    assert {row.item_id for row in found} == keep - data.unavailable - {*data.seen["u1"]}


def test_a_wider_search_costs_no_recall(
    large: tuple[str, Synthetic], large_connection: psycopg.Connection[Any]
) -> None:
    recalls = []
    for width in (1, 20, 400):
        large_connection.execute(
            "update generations set quality = jsonb_build_object('index', jsonb_build_object('ef_search', %s::int))",
            [width],
        )
        found = [_recall(large[1], retrieve(large_connection, f"u{n}", k=K), f"u{n}") for n in range(USERS)]
        recalls.append(np.mean(found))
    large_connection.rollback()
    assert recalls[0] <= recalls[1] + 0.01 <= recalls[2] + 0.02
    assert recalls[2] >= 0.99


def test_an_exact_answer_is_a_scan(large: tuple[str, Synthetic], large_connection: psycopg.Connection[Any]) -> None:
    rows = large_connection.execute(
        "select item_id from retrieve_vectors((select array_agg(embedding) from user_interests where user_id = 'u4'),"
        " exact => true)"
    ).fetchall()
    allowed = _allowed(large[1], None)
    assert {row[0] for row in rows} == {*_exact(large[1], "u4", allowed)[0]}
    assert _scans(large_connection)[1] == 0


def test_deep_answers(large: tuple[str, Synthetic], large_connection: psycopg.Connection[Any]) -> None:
    found = retrieve(large_connection, "u2", k=1000)
    assert len(found) == 1000
    assert _recall(large[1], found, "u2") >= 0.95

"""Similarity features: counted by hand, never from the future, the same in training and in serving."""

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pgvector import HalfVector

from feature_repo.schema import SEQUENCE_LENGTH
from polytower.postgres import connect
from serving.http.app import create_app
from serving.models import RetrieveRequest
from serving.rank.similarity import BINS, Pair, cosine_histogram, interest_closeness, similarity_features
from tests.conftest import as_server, cloned
from tests.generation_factory import AS_OF, Synthetic, write_generation
from tests.serving.conftest import small_data

MINUTE = timedelta(minutes=1)
LATER = AS_OF + timedelta(days=1)


def _text(item_id: str) -> np.ndarray:
    """A unit vector [4] of the item's own."""
    rows = np.random.default_rng(int(item_id[1:])).standard_normal(4)
    return (rows / np.linalg.norm(rows)).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def similar(server: str) -> Iterator[str]:
    """URL of a served database whose items, all but i09, have text; the generation is live since AS_OF."""
    data: Synthetic = small_data()
    with cloned(server, "test_similarity") as url:
        with connect(url) as connection:
            write_generation(connection, data)
            connection.execute("insert into promotions (generation, live_from) values (1, %s)", [AS_OF])
            connection.execute(
                "insert into content_encoders (modality, revision, model, dim, active)"
                " values ('text', 'r', 'm', 4, true)"
            )
            connection.cursor().executemany(
                "insert into content_embeddings (item_id, modality, revision, content_hash, embedding, encoded_at)"
                " values (%s, 'text', 'r', 'h', %s, %s)",
                [
                    (i, HalfVector(_text(i)), LATER if i == "i02" else AS_OF - 90 * MINUTE)
                    for i in data.item_ids
                    if i != "i09"
                ],
            )
        yield url


@pytest.fixture
def reading(similar: str) -> Iterator[psycopg.Connection[Any]]:
    with connect(similar) as connection:
        yield connection


def _counted(candidate: str, history: list[str]) -> list[float]:
    counts = [0] * BINS
    for event in history:
        cosine = float(_text(candidate) @ _text(event))
        counts[min(BINS - 1, int((cosine + 1) * 10))] += 1
    return [float(np.log1p(count)) for count in counts]


@given(
    cosines=arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(0, 30)), elements=st.floats(-1, 1, width=32))
)
def test_histograms_are_those_of_numpy(cosines: np.ndarray) -> None:
    """With orthonormal candidates, the history's columns are the cosines themselves."""
    found = cosine_histogram(np.eye(len(cosines), dtype=np.float32), cosines.T.copy())
    edges = np.arange(BINS + 1) * 100_000
    for row, histogram in zip(cosines.astype(float).round(6), found, strict=True):
        millionths = np.rint((row + 1) * 1e6)
        np.testing.assert_allclose(histogram, np.log1p(np.histogram(millionths, bins=edges)[0]), rtol=1e-6)
    assert np.expm1(found).sum(axis=1) == pytest.approx(cosines.shape[1], abs=1e-3)


def test_bins_begin_at_their_edges() -> None:
    cosines = np.array([[-1, -0.9, -0.1, 0, 0.1, 0.9, 1]], np.float32)
    assert np.flatnonzero(cosine_histogram(np.ones((1, 1), np.float32), cosines.T)).tolist() == [0, 1, 9, 10, 11, 19]


def test_closeness_by_hand() -> None:
    highest, mean = interest_closeness(
        np.array([[1, 0], [0, 1]], np.float32), np.array([[0.6, 0.8], [-1, 0]], np.float32)
    )
    np.testing.assert_allclose(highest, [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(mean, [-0.2, 0.4], rtol=1e-6)


def test_nothing_from_the_future_is_counted(reading: psycopg.Connection[Any]) -> None:
    """ada saw i01, i02, i05 three, two and one minutes before AS_OF; an event at the moment itself does not count."""
    moments = [AS_OF - 4 * MINUTE, AS_OF - 3 * MINUTE, AS_OF - 2 * MINUTE, AS_OF - MINUTE / 2, AS_OF]
    known: list[list[str]] = [[], [], ["i01"], ["i01", "i02", "i05"], ["i01", "i02", "i05"]]
    table = similarity_features(reading, [Pair("ada", "i20", at) for at in moments])
    for histogram, history in zip(table["similarity_text"].to_pylist(), known, strict=True):
        assert histogram == pytest.approx(_counted("i20", history), abs=1e-6)
    # The generation went live at AS_OF: before, no interests could have been known.
    assert [value is None for value in table["interest_max"].to_pylist()] == [True, True, True, True, False]
    assert table["similarity_image"].null_count == len(moments)


def test_interests_are_those_of_the_generation(reading: psycopg.Connection[Any]) -> None:
    data = small_data()
    table = similarity_features(reading, [Pair("bob", item_id, LATER) for item_id in data.item_ids])
    cosines = data.embedding @ data.interests["bob"].T
    np.testing.assert_allclose(table["interest_max"].to_numpy(), cosines.max(axis=1), atol=2e-3)
    np.testing.assert_allclose(table["interest_mean"].to_numpy(), cosines.mean(axis=1), atol=2e-3)


def test_missing_parts_are_null(reading: psycopg.Connection[Any]) -> None:
    pairs = [Pair("ada", "i09", LATER), Pair("nobody", "i20", LATER), Pair("ada", "gone", LATER)]
    table = similarity_features(reading, pairs)
    assert table["similarity_text"].to_pylist() == [None, [0.0] * BINS, None]
    assert [value is None for value in table["interest_max"].to_pylist()] == [False, True, True]
    assert similarity_features(reading, []).num_rows == 0


def test_content_that_was_recorded_later_can_be_left_out(reading: psycopg.Connection[Any]) -> None:
    """i02 was encoded after AS_OF: as an event it is not counted, as a candidate it has no histogram."""
    pairs = [Pair("ada", "i20", AS_OF), Pair("ada", "i02", AS_OF), Pair("ada", "i02", LATER)]
    first, second, third = similarity_features(reading, pairs, recorded_only=True)["similarity_text"].to_pylist()
    assert first == pytest.approx(_counted("i20", ["i01", "i05"]), abs=1e-6)
    assert second is None
    assert third == pytest.approx(_counted("i02", ["i01", "i02", "i05"]), abs=1e-6)


def test_rows_keep_their_order_over_many_chunks(reading: psycopg.Connection[Any], monkeypatch: Any) -> None:
    import serving.rank.similarity

    random = np.random.default_rng(3)
    pairs = [
        Pair(str(random.choice(["ada", "bob", "nobody"])), f"i{random.integers(60):02d}", AS_OF - n * MINUTE)
        for n in random.integers(-2, 4, size=50)
    ]
    whole = similarity_features(reading, pairs)
    monkeypatch.setattr(serving.rank.similarity, "CHUNK", 7)
    assert similarity_features(reading, pairs).combine_chunks().equals(whole.combine_chunks())
    for n, pair in enumerate(pairs[:5]):
        assert similarity_features(reading, [pair]).to_pylist() == whole.slice(n, 1).to_pylist()


def test_only_the_newest_events_count(similar: str) -> None:
    with connect(similar) as connection:
        connection.cursor().executemany(
            "insert into interactions (user_id, item_id, occurred_at) values ('much', 'i30', %s)",
            [(AS_OF - timedelta(days=3) + n * MINUTE,) for n in range(SEQUENCE_LENGTH + 50)],
        )
        table = similarity_features(connection, [Pair("much", "i20", AS_OF)])
        connection.rollback()
    assert np.expm1(table["similarity_text"][0].as_py()).sum() == pytest.approx(SEQUENCE_LENGTH, rel=1e-4)


def test_training_and_serving_are_the_same(similar: str, reading: psycopg.Connection[Any]) -> None:
    """HTTP, for retrieved candidates and for given ones, says what the offline function says of this moment."""
    with TestClient(create_app(as_server(similar))) as client:
        answer = client.post("/v1/retrieve", json={"user_id": "ada", "k": 4, "similarity": True}).json()
        items = [candidate["item_id"] for candidate in answer["candidates"]]
        entities = {"user_id": ["ada"] * 4, "item_id": items}
        given = client.post("/v1/features", json={"entities": entities, "similarity": True}).json()
        arrow = client.post(
            "/v1/retrieve",
            json={"user_id": "ada", "k": 4, "similarity": True, "fields": ["title"]},
            headers={"Accept": "application/vnd.apache.arrow.stream"},
        )
    offline = similarity_features(reading, [Pair("ada", item_id, datetime.now(UTC)) for item_id in items]).to_pylist()
    assert [candidate["similarity"] for candidate in answer["candidates"]] == offline
    keys = [{"user_id": "ada", "item_id": item_id} for item_id in items]
    assert given["rows"] == [{**key, **row} for key, row in zip(keys, offline, strict=True)]
    table = pa.ipc.open_stream(arrow.content).read_all()
    assert table.select(list(offline[0])).to_pylist() == offline
    assert table["item_id"].to_pylist() == items
    assert table["title"].to_pylist() == [f"Title {item_id}" for item_id in items]
    assert json.loads(table.schema.metadata[b"polytower"])["generation"] == 1


def test_similarity_needs_a_user(similar: str) -> None:
    with TestClient(create_app(as_server(similar))) as client:
        vectors = [[1.0] + [0.0] * 7]
        answer = client.post("/v1/retrieve", json={"vectors": vectors, "similarity": True})
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/unusable-entities")
        for body in ({"entities": {"item_id": ["i01"]}, "similarity": True}, {"entities": {"item_id": ["i01"]}}):
            assert client.post("/v1/features", json=body).status_code == 422
        batch = {"requests": [{"vectors": vectors, "similarity": True}, {"user_id": "ada", "k": 1, "similarity": True}]}
        refused, answered = client.post("/v1/retrieve:batch", json=batch).json()["answers"]
        assert refused["type"] == "/problems/unusable-entities"
        assert answered["candidates"][0]["similarity"]["interest_max"] > 0


@given(rows=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-1, 1, width=32)))
def test_binary_vectors_are_the_same_vectors(rows: np.ndarray) -> None:
    encoded = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows]
    given_rows = RetrieveRequest.model_validate({"vectors": encoded}).vectors
    assert given_rows == RetrieveRequest.model_validate({"vectors": rows.tolist()}).vectors

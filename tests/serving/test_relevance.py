"""What of a long history matters for a candidate: counted by hand, never from the future, the same at every door."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from pgvector import HalfVector

from pipelines.content_codes import code_content, read_codec
from polytower.errors import UserError
from polytower.postgres import connect
from serving.http.app import create_app
from serving.rank import relevance
from serving.rank.relevance import COLUMNS, TEMPERATURE, relevance_features
from serving.rank.similarity import BINS, Pair
from tests.conftest import as_server, cloned
from tests.generation_factory import AS_OF, write_generation
from tests.serving.conftest import small_data

MINUTE = timedelta(minutes=1)
LATER = AS_OF + timedelta(days=1)
WIDTHS = {"text": 8, "image": 12}


def _content(modality: str, item_id: str) -> np.ndarray:
    """A unit vector of the item's own, near one of three directions."""
    number = int(item_id[1:])
    tastes = np.random.default_rng(WIDTHS[modality]).standard_normal((3, WIDTHS[modality]))
    row = tastes[number % 3] + 0.4 * np.random.default_rng(number).standard_normal(WIDTHS[modality])
    return (row / np.linalg.norm(row)).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def coded(server: str) -> Iterator[str]:
    """URL of a served database whose items have text (all but i09) and a picture (those of even numbers), and codes.

    ada saw i01, i02, i05 just before AS_OF; carl, on top, a hundred events of ten items in the hours before.
    """
    data = small_data()
    with cloned(server, "test_relevance") as url:
        with connect(url) as connection:
            write_generation(connection, data)
            connection.execute("insert into promotions (generation, live_from) values (1, %s)", [AS_OF])
            for modality, width in WIDTHS.items():
                connection.execute(
                    "insert into content_encoders (modality, revision, model, dim, active)"
                    " values (%s, 'r', 'm', %s, true)",
                    [modality, width],
                )
            connection.cursor().executemany(
                "insert into content_embeddings (item_id, modality, revision, content_hash, embedding)"
                " values (%s, %s, 'r', 'h', %s)",
                [
                    (item, modality, HalfVector(_content(modality, item)))
                    for modality in WIDTHS
                    for item in data.item_ids
                    if (item != "i09" if modality == "text" else int(item[1:]) % 2 == 0)
                ],
            )
            connection.cursor().executemany(
                "insert into interactions (user_id, item_id, occurred_at) values ('carl', %s, %s)",
                [(f"i{10 + n % 10}", AS_OF - n * MINUTE) for n in range(1, 101)],
            )
            code_content(connection)
        yield url


@pytest.fixture
def reading(coded: str) -> Iterator[psycopg.Connection[Any]]:
    with connect(coded) as connection:
        yield connection


def _folded(connection: psycopg.Connection[Any], items: list[str]) -> np.ndarray:
    """What the stored codes of items stand for, the modalities' mean: [N, D]."""
    (number,) = connection.execute("select code_set from code_sets").fetchone() or ()
    codec = read_codec(connection, number)
    rows = []
    for item in items:
        found = connection.execute(
            "select modality, codes from content_codes join codebooks using (codebook_id) where item_id = %s", [item]
        ).fetchall()
        decoded = [codec.quantisers[name].decode(np.frombuffer(code, np.uint8)[None])[0] for name, code in found]
        rows.append(np.mean(decoded, axis=0))
    return np.stack(rows)


def test_the_items_most_like_a_candidate_are_found(reading: psycopg.Connection[Any]) -> None:
    """carl's ten items by hand: order, scores, attention, and a histogram that counts every event."""
    items = [f"i{n}" for n in range(10, 20)]
    history, candidate = _folded(reading, items), _folded(reading, ["i33"])[0]
    scores = history @ candidate
    order = np.argsort(-scores)[:4]
    (row,) = relevance_features(reading, [Pair("carl", "i33", LATER)], 4).to_pylist()
    assert row["relevant_items"] == [items[place] for place in order]
    np.testing.assert_allclose(row["relevant_scores"], scores[order], atol=1e-5)
    heights = np.exp(scores[order] / TEMPERATURE)
    np.testing.assert_allclose(row["relevant_attention"], heights / heights.sum(), atol=1e-4)
    cosines = scores / np.linalg.norm(history, axis=1) / np.linalg.norm(candidate)
    counted = np.bincount(((cosines + 1) * 10).astype(int).clip(0, BINS - 1), minlength=BINS) * 10
    np.testing.assert_allclose(row["relevant_histogram"], np.log1p(counted), atol=1e-5)
    assert {int(item[1:]) % 3 for item in row["relevant_items"][:2]} == {0}
    name = reading.execute("select semantic_id from item_semantic_ids where item_id = 'i33'").fetchone()
    assert (row["semantic_id"],) == name
    assert row["code_set"] == 1


def test_nothing_from_the_future_is_found(reading: psycopg.Connection[Any]) -> None:
    """ada saw i01, i02, i05 three, two and one minutes before AS_OF; an event at the moment itself does not count."""
    moments = [AS_OF - 4 * MINUTE, AS_OF - 3 * MINUTE, AS_OF - 2 * MINUTE, AS_OF - MINUTE / 2]
    known = [set(), set(), {"i01"}, {"i01", "i02", "i05"}]
    found = relevance_features(reading, [Pair("ada", "i20", at) for at in moments], 10).to_pylist()
    assert [set(row["relevant_items"]) for row in found] == known
    assert [round(float(np.expm1(row["relevant_histogram"]).sum())) for row in found] == [0, 0, 1, 3]


def test_the_newest_events_are_seen(reading: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevance, "LONG_HISTORY", 3)
    (row,) = relevance_features(reading, [Pair("carl", "i33", LATER)], 10).to_pylist()
    assert set(row["relevant_items"]) == {"i11", "i12", "i13"}


def test_missing_parts_are_null_or_empty(reading: psycopg.Connection[Any]) -> None:
    pairs = [Pair("carl", "i09", LATER), Pair("nobody", "i20", LATER), Pair("carl", "gone", LATER)]
    bare, unknown, gone = relevance_features(reading, pairs, 3).to_pylist()
    assert bare == gone == dict.fromkeys(COLUMNS)
    assert unknown["relevant_items"] == unknown["relevant_attention"] == []
    assert unknown["relevant_histogram"] == [0.0] * BINS
    assert len(unknown["semantic_id"]) == 4
    assert relevance_features(reading, [], 3).num_rows == 0


def test_rows_keep_their_order_over_many_chunks(
    reading: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(3)
    pairs = [
        Pair(str(random.choice(["ada", "carl", "nobody"])), f"i{random.integers(60):02d}", AS_OF - n * MINUTE)
        for n in random.integers(-2, 4, size=50)
    ]
    whole = relevance_features(reading, pairs, 5)
    monkeypatch.setattr(relevance, "CHUNK", 7)
    monkeypatch.setattr(relevance, "BLOCK", 2)
    assert relevance_features(reading, pairs, 5).combine_chunks().equals(whole.combine_chunks())
    assert relevance_features(reading, pairs[:3], 5).to_pylist() == whole.to_pylist()[:3]


def test_every_door_gives_the_same(coded: str, reading: psycopg.Connection[Any]) -> None:
    with TestClient(create_app(as_server(coded))) as client:
        asked = {"user_id": "ada", "k": 5, "relevant": 2}
        answer = client.post("/v1/retrieve", json=asked).json()
        items = [candidate["item_id"] for candidate in answer["candidates"]]
        offline = relevance_features(reading, [Pair("ada", item, datetime.now(UTC)) for item in items], 2).to_pylist()
        assert [candidate["relevant"] for candidate in answer["candidates"]] == offline
        entities = {"user_id": ["ada"] * 5, "item_id": items}
        body = {"relevant": 2, "similarity": True, "entities": entities}
        rows = client.post("/v1/features", json=body).json()["rows"]
        assert [{name: row[name] for name in COLUMNS} for row in rows] == offline
        assert all("similarity_text" in row for row in rows)
        arrow = client.post("/v1/retrieve", json=asked, headers={"accept": "application/vnd.apache.arrow.stream"})
        table = pa.ipc.open_stream(arrow.content).read_all()
        assert table.select(list(COLUMNS)).to_pylist() == offline


@pytest.mark.parametrize("relevant", [0, 201, "many"])
def test_how_many_is_bounded(coded: str, relevant: Any) -> None:
    with TestClient(create_app(as_server(coded))) as client:
        entities = {"user_id": ["ada"], "item_id": ["i01"]}
        for path, body in (("/v1/retrieve", {"user_id": "ada"}), ("/v1/features", {"entities": entities})):
            assert client.post(path, json={**body, "relevant": relevant}).status_code == 422


def test_relevance_needs_a_user(coded: str) -> None:
    with TestClient(create_app(as_server(coded))) as client:
        vectors = [[1.0] + [0.0] * (small_data().embedding.shape[1] - 1)]
        answer = client.post("/v1/retrieve", json={"vectors": vectors, "relevant": 3})
        assert (answer.status_code, "ask by user_id" in answer.json()["detail"]) == (422, True)
        answer = client.post("/v1/features", json={"entities": {"item_id": ["i01"]}, "relevant": 3})
        assert answer.status_code == 422


def test_stale_and_absent_codes_are_refused_in_words(coded: str) -> None:
    pair = [Pair("carl", "i33", LATER)]
    with connect(coded) as connection, connection.transaction(force_rollback=True):
        connection.execute("update content_encoders set active = false where modality = 'text'")
        connection.execute(
            "insert into content_encoders (modality, revision, model, dim, active) values ('text', 's', 'm', 8, true)"
        )
        with pytest.raises(UserError, match="another encoder is in force for text; `polytower materialize"):
            relevance_features(connection, pair, 3)
        connection.execute("delete from code_sets")
        with pytest.raises(UserError, match="there are no content codes: `polytower materialize --until content`"):
            relevance_features(connection, pair, 3)


def test_the_server_tells_that_codes_are_absent(server: str) -> None:
    with cloned(server, "test_relevance_none") as url:
        with connect(url) as connection:
            write_generation(connection, small_data())
            connection.execute("insert into promotions (generation, live_from) values (1, %s)", [AS_OF])
        with TestClient(create_app(as_server(url))) as client:
            answer = client.post("/v1/retrieve", json={"user_id": "ada", "relevant": 3})
            assert answer.status_code == 422
            assert "there are no content codes" in json.loads(answer.content)["detail"]

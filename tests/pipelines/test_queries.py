"""Queries from the log to the answer: encoded once, read by the towers, and asked with by a user who searches."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from fastapi.testclient import TestClient
from pgvector import HalfVector

from encoders.content.registry import encoder_of
from encoders.content.text import TextEncoder
from encoders.evaluation.evaluate import context_of, padded
from encoders.towers.towers import Context, Towers
from encoders.training import checkpoint
from feature_repo.modalities import BLANK, item_text
from feature_repo.schema import MAX_QUERY_CHARACTERS
from pipelines.content_embeddings import encode_modality
from pipelines.generation import lifecycle
from pipelines.generation.build import build
from pipelines.generation.training import Checkpoint, aligned, read_snapshot, train_checkpoint
from pipelines.generation.training_set import read_catalogue, read_training_set
from pipelines.load.folder import load_folder
from pipelines.query_embeddings import encode_queries
from polytower.errors import UserError
from polytower.postgres import connect
from polytower.settings import settings
from serving.http.app import create_app
from tests.factories import tiny_folder
from tests.serving.conftest import PATIENT

OPTIONS = {
    "epochs": 12, "unit_epochs": 2, "towers.dim": 32, "towers.dropout": 0.1, "batch_rows": 8, "learning_rate": 5e-3,
    "threads": 1,
}  # fmt: skip
LONG = "zombies " * (MAX_QUERY_CHARACTERS // 8)
Connection = psycopg.Connection[Any]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    made = encoder_of("text", settings())
    assert isinstance(made, TextEncoder)
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def opened(module_database: str, home: Path, encoder: TextEncoder) -> Iterator[Connection]:
    """Forty users, who search by titles; some event has a blank query, one a query of ten thousand letters."""
    with connect(module_database) as connection:
        load_folder(connection, tiny_folder(home / "data", queries=True))
        for query, user in ((" \u2003\t", "u0"), (LONG, "u1")):
            connection.execute(
                """update interactions set query = %s where position =
                   (select max(position) from interactions where user_id = %s)""",
                [query, user],
            )
        encode_modality(connection, "text", encoder)
        encode_queries(connection, encoder)
        yield connection


@pytest.fixture(scope="module")
def trained(opened: Connection, home: Path) -> Checkpoint:
    data = read_training_set(opened, queries=True)
    return train_checkpoint(data, "seminar", home / "checkpoints", options=OPTIONS, device="cpu")


@pytest.fixture(scope="module")
def client(module_database: str, opened: Connection, trained: Checkpoint) -> Iterator[TestClient]:
    lifecycle.promote(opened, build(opened, trained.directory))
    with TestClient(create_app(module_database, caps=PATIENT), raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, **question: Any) -> dict[str, Any]:
    answer = client.post("/v1/retrieve", json={"exclude_seen": False, "k": 60, **question})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def scores(body: dict[str, Any]) -> dict[str, float]:
    return {row["item_id"]: row["score"] for row in body["candidates"]}


def test_each_text_is_encoded_once(opened: Connection, encoder: TextEncoder) -> None:
    distinct = opened.execute("select count(distinct query_key(query)) from interactions").fetchone()
    stored = opened.execute("select count(*) from query_embeddings").fetchone()
    assert distinct == stored
    again = encode_queries(opened, encoder)
    assert (again.queries, again.encoded, again.skipped) == (distinct and distinct[0], 0, 0)


@pytest.mark.parametrize("text", ["", " ", BLANK, "zombies", f"{BLANK}zombies {BLANK}", "\u2003ä\u200b", LONG])
def test_sql_and_python_agree_on_what_a_query_says(opened: Connection, text: str) -> None:
    row = opened.execute("select query_key(%s), md5(%s)", [text, item_text(text, None)]).fetchone()
    assert row is not None
    assert row[0] == (row[1] if item_text(text, None) else None)


def test_training_reads_the_queries_of_each_event(opened: Connection, encoder: TextEncoder) -> None:
    histories = read_training_set(opened, queries=True).histories
    assert histories.queries is not None
    assert histories.query_vectors is not None
    log = opened.execute(
        'select query from interactions order by user_id collate "C", occurred_at, position'
    ).fetchall()
    texts = [item_text(query, None) for (query,) in log]
    assert [row >= 0 for row in histories.queries] == [bool(text) for text in texts]
    alone = np.concatenate(list(encoder.encode([text for text in texts if text][:20])))
    read = histories.query_vectors[histories.queries[histories.queries >= 0][:20]]
    np.testing.assert_allclose(read, alone, atol=2e-3)
    assert read_training_set(opened).histories.queries is None


def test_events_without_queries_are_refused(emptied_elsewhere: Connection, home: Path) -> None:
    load_folder(emptied_elsewhere, tiny_folder(home / "without"))
    data = read_training_set(emptied_elsewhere, queries=True)
    with pytest.raises(UserError, match="no interaction has a query that is encoded"):
        train_checkpoint(data, "seminar", home / "none", options=OPTIONS, device="cpu")


@pytest.fixture
def emptied_elsewhere(connection: Connection) -> Connection:
    return connection


def test_the_feature_has_the_queries_beside_the_items(opened: Connection) -> None:
    from pipelines.sequences import changed_days, refresh_sequences

    days = changed_days(opened)
    assert days is not None
    refresh_sequences(opened, *days)
    row = opened.execute(
        "select item_ids, queries from user_sequences where user_id = 'u1' order by day desc limit 1"
    ).fetchone()
    assert row is not None
    assert len(row[0]) == len(row[1]) == 16
    assert row[1][-1] == LONG[:200]


def towers_of(opened: Connection, trained: Checkpoint) -> Towers:
    item_ids, _ = read_snapshot(trained.directory)
    towers, _, _ = checkpoint.load(trained.directory, aligned(read_catalogue(opened)[0], item_ids))
    return towers


def offline(opened: Connection, towers: Towers, user: str, asked: np.ndarray | None = None) -> np.ndarray:
    """The user's interests, computed from the training set and the stored embeddings; asked: text embedding."""
    import torch

    histories = read_training_set(opened, queries=True).histories
    alone = histories.select(np.array([histories.user_ids.index(user)]))
    rows, mask = padded(alone, towers.config.history)
    items = towers.item_embeddings().item.to(torch.float16).float()
    context = context_of(alone, towers.config)
    if asked is not None:
        context = context._replace(asked=torch.from_numpy(asked)[None, None])
    return towers.user_interests(items[rows], mask, Context(*context)).vectors[0].numpy()


def test_a_search_is_the_same_in_http_and_sql(
    client: TestClient, opened: Connection, trained: Checkpoint, encoder: TextEncoder
) -> None:
    towers = towers_of(opened, trained)
    (vector,) = np.concatenate(list(encoder.encode(["kitchen 5"])))
    wanted = offline(opened, towers, "u1", vector)
    body = ask(client, user_id="u1", text="  kitchen 5 ")
    assert body["interests"] == "online"
    rows = opened.execute(
        "select item_id, score from retrieve_vectors(%s::halfvec[], k => 60)", [[HalfVector(one) for one in wanted]]
    ).fetchall()
    by_http = scores(body)
    assert set(by_http) == {item for item, _ in rows}
    assert max(abs(by_http[item] - score) for item, score in rows) < 2e-3


def test_a_search_finds_what_is_searched_for(client: TestClient) -> None:
    """Nine of ten titles are among the first ten of sixty, whoever asks, and not without the text."""
    asked = [(f"u{n}", item) for n, item in enumerate(range(0, 58, 2))]
    word = ("rocket", "kitchen", "forest", "heist")
    found = [
        f"i{item}" in list(scores(ask(client, user_id=user, text=f"{word[item % 4]} {item}")))[:10]
        for user, item in asked
    ]
    without = [f"i{item}" in list(scores(ask(client, user_id=user)))[:10] for user, item in asked]
    assert np.mean(found) > 0.8 > 0.5 > np.mean(without)


def test_stored_interests_read_the_queries_of_the_history(
    client: TestClient, opened: Connection, trained: Checkpoint
) -> None:
    towers = towers_of(opened, trained)
    stored = opened.execute("select embedding from user_interests('u1')").fetchall()
    wanted = offline(opened, towers, "u1")
    np.testing.assert_allclose(np.stack([row[0].to_numpy() for row in stored]), wanted, atol=2e-3)
    assert ask(client, user_id="u1")["interests"] == "stored"


def test_two_users_find_other_things_by_the_same_text(client: TestClient) -> None:
    one, other = (scores(ask(client, user_id=user, text="a story")) for user in ("u0", "u1"))
    assert max(abs(one[item] - other[item]) for item in one) > 1e-2


def test_a_history_may_search_as_well(client: TestClient) -> None:
    searched = scores(ask(client, history=["i1", "i5"], text="kitchen 9"))
    assert searched != scores(ask(client, history=["i1", "i5"]))
    assert ask(client, history=["nothing"], text="kitchen 9")["skipped"] == ["nothing"]


def test_a_new_event_counts_with_its_query_once_it_is_encoded(
    client: TestClient, opened: Connection, encoder: TextEncoder
) -> None:
    event = {
        "user_id": "u3", "item_id": "i7", "query": "never asked before",
        "occurred_at": datetime(2024, 2, 1, tzinfo=UTC).isoformat(),
    }  # fmt: skip
    assert client.post("/v1/interactions", json={"interactions": [event]}).status_code == 200
    before = ask(client, user_id="u3")
    assert before["interests"] == "online"
    assert "1 queries of the user's newest events are not encoded yet" in before["degraded"]
    assert encode_queries(opened, encoder).encoded == 1
    after = ask(client, user_id="u3")
    assert after["degraded"] is None
    assert scores(after) != scores(before)


@pytest.mark.parametrize(
    ("question", "status", "words"),
    [
        ({"user_id": "nobody", "text": "kitchen"}, 404, "nobody"),
        ({"user_id": "u1", "text": " \u2003"}, 422, "blanks"),
        ({"user_id": "u1", "text": "x" * (MAX_QUERY_CHARACTERS + 1)}, 422, "text"),
        ({"user_id": "u1", "image": "eA==", "text": "x", "merge": "rrf"}, 422, "merge = max alone"),
        ({"user_id": "u1", "text": "x", "space": "content", "merge": "rrf"}, 422, "merge = max alone"),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_said(client: TestClient, question: dict[str, Any], status: int, words: str) -> None:
    answer = client.post("/v1/retrieve", json=question)
    assert answer.status_code == status, answer.text
    assert words in answer.text


def test_long_texts_are_searched(client: TestClient) -> None:
    assert len(ask(client, user_id="u1", text="x" * MAX_QUERY_CHARACTERS)["candidates"]) > 50


def test_many_questions_at_once(client: TestClient) -> None:
    asked = [{"user_id": "u1", "text": "kitchen 5"}, {"user_id": "u1"}, {"text": "kitchen 5"}]
    answers = client.post("/v1/retrieve:batch", json={"requests": asked}).json()["answers"]
    assert [answer["interests"] for answer in answers] == ["online", "stored", "content"]


def test_a_mix_is_answered_by_both_scores(client: TestClient) -> None:
    searched = ask(client, user_id="u1", text="kitchen 5", k=20)
    mixed = ask(client, user_id="u1", text="kitchen 5", mix=0.5, k=20)
    assert (searched["interests"], mixed["interests"]) == ("online", "stored")
    assert [one["score"] for one in searched["candidates"]] != [one["score"] for one in mixed["candidates"]]
    assert (
        ask(client, user_id="u1", text="kitchen 5", mix=0, k=20)["candidates"][0]["item_id"]
        == (ask(client, user_id="u1", k=20)["candidates"][0]["item_id"])
    )
    assert ask(client, user_id="u1", text="kitchen 5", merge="rrf")["candidates"]


def test_towers_that_read_no_queries_mix(client: TestClient, opened: Connection, home: Path) -> None:
    """Last: it promotes another generation."""
    plain = train_checkpoint(read_training_set(opened), "tiny", home / "plain", options={"epochs": 1}, device="cpu")
    lifecycle.promote(opened, build(opened, plain.directory))
    assert ask(client, user_id="u1", text="kitchen 5") == ask(client, user_id="u1", text="kitchen 5", mix=0.5)
    answer = client.post("/v1/retrieve", json={"user_id": "u1", "text": "kitchen 5", "merge": "rrf"})
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/no-personalised-search")
    assert "--preset seminar" in answer.json()["detail"]
    assert client.post("/v1/retrieve", json={"user_id": "u1"}).status_code == 200

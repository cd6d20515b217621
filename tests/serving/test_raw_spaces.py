"""The content encoders' own spaces: SQL and HTTP as plain Python has it, alone and mixed with a user's interests."""

from typing import Any

import numpy as np
import psycopg
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pgvector import HalfVector

from feature_repo.modalities import MODALITIES
from pipelines import content_index
from polytower.postgres import connect
from serving import queries
from serving.http.app import create_app
from serving.question import Interests, Question
from tests.conftest import as_server
from tests.generation_factory import RAW_REVISION, Synthetic, unit, write_generation
from tests.serving.conftest import PATIENT
from tests.serving.reference import ANY_LENGTH, eighths, interest_lists

WIDTH = 5


@st.composite
def catalogues(draw: st.DrawFn) -> Synthetic:
    """Up to 80 items with texts (some without), of which some are unavailable; a user of up to 4 interests."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items, interests = draw(st.integers(1, 80)), draw(st.integers(1, 4))
    texts = eighths(random, items, WIDTH)
    texts[random.random(items) < 0.2] = 0
    item_ids = [f"{'Éabß'[n % 4]}-{n}" for n in range(items)]
    return Synthetic(
        item_ids,
        eighths(random, items, 3),
        {"u": eighths(random, interests, 3)},
        attributes=[{"year": int(random.integers(1985, 2005))} for _ in item_ids],
        unavailable=frozenset(i for i in item_ids if random.random() < 0.1),
        raw={"text": texts},
    )


def _available(data: Synthetic, since: int) -> list[bool]:
    assert data.attributes is not None
    return [
        item_id not in data.unavailable and row["year"] >= since
        for item_id, row in zip(data.item_ids, data.attributes, strict=True)
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=catalogues(), k=st.sampled_from([1, 7, 100]), seed=st.integers(0, 99))
def test_a_raw_space_is_searched_as_the_reference_does(
    connection: psycopg.Connection[Any], data: Synthetic, k: int, seed: int
) -> None:
    wanted = eighths(np.random.default_rng(seed), 1, WIDTH)
    has_text = data.raw["text"].any(axis=1)
    qualifies = [ok and bool(has) for ok, has in zip(_available(data, 1980), has_text, strict=True)]
    (expected,) = interest_lists(data.item_ids, data.raw["text"], wanted, qualifies, k)
    with connection.transaction(force_rollback=True):
        connection.execute(ANY_LENGTH)
        write_generation(connection, data, index=False)
        found = connection.execute(
            "select item_id, score, rank from nearest(%s, %s, 'text')", [HalfVector(wanted[0]), k]
        ).fetchall()
    assert found == [(row.item_id, row.score, row.rank) for row in expected]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    data=catalogues(),
    k=st.sampled_from([1, 7, 100]),
    mix=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    since=st.sampled_from([1985, 1995]),
    seed=st.integers(0, 99),
)
def test_a_mixed_question_is_answered_as_the_reference_does(
    connection: psycopg.Connection[Any], data: Synthetic, k: int, mix: float, since: int, seed: int
) -> None:
    wanted = eighths(np.random.default_rng(seed), 1, WIDTH)[0]
    question = Question(
        user_id="u", text="is already a vector", mix=mix, k=k, filter={"year": {"gte": since}}, exclude_seen=False
    )
    interests = Interests("stored", data.interests["u"], None, range(len(data.interests["u"])), content=wanted)
    with connection.transaction(force_rollback=True):
        connection.execute(ANY_LENGTH)
        generation = write_generation(connection, data, index=False)
        parameters = queries.search_parameters(question, interests, generation)
        found = connection.execute(queries.CANDIDATES_MIXED, parameters, binary=True).fetchall()
    liked = data.embedding @ data.interests["u"].T
    total = np.float32(mix * (data.raw["text"] @ wanted).astype(float) + (1 - mix) * liked.max(axis=1).astype(float))
    order = sorted(
        (n for n, ok in enumerate(_available(data, since)) if ok),
        key=lambda n: (-total[n], data.item_ids[n].encode()),
    )
    assert [(row[0], row[1], row[3]) for row in found] == [
        (data.item_ids[n], float(total[n]), int(liked[n].argmax())) for n in order[:k]
    ]


@pytest.fixture
def shelf() -> Synthetic:
    """Fifty items in two raw spaces; nothing in the towers' spaces is like them."""
    random = np.random.default_rng(3)
    return Synthetic(
        [str(n) for n in range(50)],
        unit(random.standard_normal((50, 4))),
        {"ada": unit(random.standard_normal((2, 4)))},
        seen={"ada": ["1", "2"]},
        raw={"text": unit(random.standard_normal((50, 6))), "attributes": unit(random.standard_normal((50, 3)))},
    )


def test_a_sum_of_vectors_is_one_question(database: str, shelf: Synthetic) -> None:
    """Like 1 and 2, not like 3: by numpy, SQL and HTTP, in a raw space and among a user's interests."""
    with connect(database) as connection:
        write_generation(connection, shelf)
    texts = shelf.raw["text"].astype(np.float16).astype(np.float32)
    wanted = unit(texts[[1, 2, 3]].T @ np.array([1, 1, -0.5], np.float32)).astype(np.float16).astype(np.float32)
    order = [str(n) for n in np.argsort(-(texts @ wanted)) if n not in (1, 2, 3)][:10]
    asked = {
        "vectors": texts[[1, 2, 3]].tolist(), "weights": [1, 1, -0.5], "merge": "sum", "space": "text", "k": 10,
        "exclude": ["1", "2", "3"],
    }  # fmt: skip
    interests = shelf.interests["ada"].astype(np.float16).astype(np.float32)
    items = shelf.embedding.astype(np.float16).astype(np.float32)
    mean = unit(interests.sum(axis=0)).astype(np.float16).astype(np.float32)
    of_ada = [str(n) for n in np.argsort(-(items @ mean)) if n not in (1, 2)][:10]
    with TestClient(create_app(as_server(database), caps=PATIENT)) as client:
        found = client.post("/v1/retrieve", json=asked).json()
        assert [row["item_id"] for row in found["candidates"]] == order
        found = client.post("/v1/retrieve", json={"user_id": "ada", "merge": "sum", "k": 10}).json()
        assert [row["item_id"] for row in found["candidates"]] == of_ada
        assert {row["interest"] for row in found["candidates"]} == {0}


def test_every_door_answers_in_raw_spaces(database: str, shelf: Synthetic) -> None:
    with connect(database) as connection:
        write_generation(connection, shelf)
    with TestClient(create_app(as_server(database), caps=PATIENT)) as client, connect(database) as connection:
        for space, vectors in shelf.raw.items():
            stored = vectors.astype(np.float16).astype(np.float32)
            order = [str(n) for n in np.argsort(-(stored @ stored[7])) if n != 7][:10]
            assert [row.item_id for row in queries.similar(connection, "7", space=space)] == order
            body = client.get("/v1/items/7/similar", params={"space": space}).json()
            assert [row["item_id"] for row in body["items"]] == order
            asked = {"vectors": [stored[7].tolist()], "space": space, "exclude": ["7"], "k": 10}
            found = client.post("/v1/retrieve", json=asked).json()
            assert [row["item_id"] for row in found["candidates"]] == order


def test_what_came_after_the_generation_is_there(connection: psycopg.Connection[Any], shelf: Synthetic) -> None:
    """Raw spaces are content as it is now; towers know what there was."""
    write_generation(connection, shelf)
    connection.execute("insert into items (item_id) values ('new'), ('bare')")
    connection.execute(
        "insert into content_embeddings (item_id, modality, revision, content_hash, embedding)"
        " values ('new', 'text', %s, '', %s)",
        [RAW_REVISION, HalfVector(shelf.raw["text"][7])],
    )
    assert queries.similar(connection, "7", space="text", k=1)[0].item_id == "new"
    assert queries.similar(connection, "new", space="text", k=1)[0].item_id == "7"
    for item_id, space, state in (("new", "item", "PT003"), ("bare", "text", "PT011"), ("none", "text", "PT003")):
        with pytest.raises(psycopg.Error) as refused, connection.transaction():
            queries.similar(connection, item_id, space=space)
        assert refused.value.sqlstate == state, item_id


def test_a_space_that_the_generation_lacks_is_named(connection: psycopg.Connection[Any], shelf: Synthetic) -> None:
    write_generation(connection, shelf)
    with pytest.raises(psycopg.Error, match='has no space "image"') as refused:
        queries.similar(connection, "7", space="image")
    assert refused.value.sqlstate == "PT009"
    assert refused.value.diag.message_hint == "item, content, id, text, attributes"


def test_the_index_of_a_raw_space_is_walked(database: str) -> None:
    random = np.random.default_rng(1)
    vectors = unit(random.standard_normal((2500, 8)))
    data = Synthetic([str(n) for n in range(2500)], unit(random.standard_normal((2500, 4))), raw={"text": vectors})
    name = content_index.index_name("text", RAW_REVISION)
    with connect(database) as connection:
        write_generation(connection, data, index=False)
        assert not _walkable(connection)
        scanned = [row.item_id for row in queries.similar(connection, "7", space="text", k=50)]
        assert content_index.ensure(connection, "text", RAW_REVISION, dim=8, items=2500) > 0
        assert content_index.ensure(connection, "text", RAW_REVISION, dim=8, items=2500) == 0
        assert _walkable(connection)
        walked = [row.item_id for row in queries.similar(connection, "7", space="text", k=50)]
        assert len({*walked} & {*scanned}) >= 48
        (statement,) = _one(connection, "select walk_statement(searched_space(1, 4, 'text'), null, '{}')")
        connection.execute("set local enable_seqscan = off; set local enable_sort = off")
        asked = statement.replace("$1", "%s")
        plan = connection.execute(f"explain {asked} limit 10", [HalfVector(vectors[7])] * asked.count("%s")).fetchall()
        assert any(f"Index Scan using {name}" in line for (line,) in plan), plan
        content_index.drop_before(connection, "text", RAW_REVISION, items=2500, missing=10)
        assert _walkable(connection)
        content_index.drop_before(connection, "text", RAW_REVISION, items=2500, missing=1000)
        assert not _walkable(connection)


@pytest.mark.parametrize(("name", "items", "dim"), [("text", 2000, 8), ("attributes", 5000, 8), ("vector", 5000, 4001)])
def test_an_index_that_nothing_would_read_is_not_built(
    connection: psycopg.Connection[Any], name: str, items: int, dim: int
) -> None:
    assert content_index.ensure(connection, name, "r", dim=dim, items=items) == 0
    assert MODALITIES[name].indexed is (name != "attributes")


def _walkable(connection: psycopg.Connection[Any]) -> bool:
    return bool(_one(connection, "select (searched_space(1, 4, 'text')).walkable")[0])


def _one(connection: psycopg.Connection[Any], statement: str) -> tuple[Any, ...]:
    row = connection.execute(statement).fetchone()  # type: ignore[call-overload]
    assert row is not None
    return tuple(row)

"""The SQL functions: refusals, rights, and answers that need no reference."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg.types.json import Jsonb

from pipelines.generation.lifecycle import amends
from polytower.postgres import connect
from serving import queries
from serving.errors import PROBLEMS
from serving.queries import similar
from serving.question import Question
from tests.generation_factory import Synthetic, promote, write_generation
from tests.serving.asking import retrieve

SQL = Path(__file__).parents[2] / "migrations" / "sql"
INJECTION = "x'; drop table items; -- \" \\ $$ %s {} ||"


@pytest.mark.parametrize(
    ("statement", "state", "words"),
    [
        ("select * from retrieve('nobody')", "PT002", '"nobody"'),
        ("select * from retrieve(null)", "PT002", '"null"'),
        ("select * from retrieve('newcomer')", "PT012", '"newcomer"'),
        ("select * from user_interests('nobody')", "PT002", '"nobody"'),
        ("select * from similar_items('nothing')", "PT003", '"nothing"'),
        ("select * from retrieve('ada', 0)", "PT004", "k is 0"),
        ("select * from retrieve('ada', 1001)", "PT004", "k is 1001"),
        ("select * from retrieve('ada', 2147483647)", "PT004", "k is 2147483647"),
        ("select * from retrieve('ada', null)", "PT004", "null"),
        ("select * from nearest('[1,2,3]')", "PT005", "3 dimensions"),
        ("select * from retrieve_vectors('{}'::halfvec[])", "PT005", "not 0"),
        ("select * from retrieve_vectors(null)", "PT005", "not 0"),
        ("select * from retrieve_vectors(array[null]::halfvec[])", "PT005", "dimensions"),
        ("select * from retrieve_vectors(array['[1,0,0,0,0,0,0,0]']::halfvec[], '{1,1}')", "PT005", "2 weights"),
        ("select * from retrieve_vectors(array['[1,0,0,0,0,0,0,0]']::halfvec[], '{NaN}')", "PT006", "weights"),
        ("select * from retrieve_vectors(array['[1,0,0,0,0,0,0,0]']::halfvec[], '{0}')", "PT006", "weights"),
        ("select * from retrieve('ada', 10, '{\"gnere\": \"Comedy\"}')", "PT007", '"gnere"'),
        ("select * from retrieve('ada', 10, '[]')", "PT008", "not a JSON object"),
        ("select * from retrieve('ada', 10, '{\"genres\": [\"Comedy\"]}')", "PT008", '"genres"'),
        ("select * from retrieve('ada', 10, '{\"genres\": {\"any\": []}}')", "PT008", '"any"'),
        ("select * from retrieve('ada', 10, '{\"genres\": {\"any\": [[1]]}}')", "PT008", '"any"'),
        ("select * from retrieve('ada', 10, '{\"year\": {\"near\": 3}}')", "PT008", '"near"'),
        ("select * from retrieve('ada', 10, '{\"year\": {\"gt\": null}}')", "PT008", '"gt"'),
        ("select * from retrieve('ada', 10, '{\"year\": {}}')", "PT008", "says nothing"),
        ('select * from retrieve(\'ada\', 10, \'{"year": {"gte": "1990"}}\')', "PT008", '"year" holds numbers'),
        ("select * from retrieve('ada', 10, '{\"year\": \"1990\"}')", "PT008", "compares it with a string"),
        ("select * from retrieve('ada', 10, '{\"genres\": {\"any\": [1, true]}}')", "PT008", '"genres" holds strings'),
        ("select * from retrieve('ada', 10, '{\"genres\": {\"lt\": 3}}', allow => '{i01}')", "PT008", "with a number"),
        ("select * from retrieve_vectors(array['[1,0,0,0,0,0,0,0]']::halfvec[], '{-1}')", "PT006", "negative"),
        (
            "select * from retrieve_vectors(array['[1,0,0,0,0,0,0,0]', '[1,0,0,0,0,0,0,0]']::halfvec[], '{1,-1}',"
            " merge => 'sum')",
            "PT006",
            "cancel out",
        ),
        (
            "select * from retrieve_vectors(array['[1,0,0,0,0,0,0,0]']::halfvec[], '{-infinity}', merge => 'sum')",
            "PT006",
            "finite",
        ),
        ("select * from similar_items('i01', 10, 'taste')", "PT009", '"taste"'),
        ("select * from retrieve('ada', merge => 'product')", "PT010", '"product"'),
        ("select * from retrieve_vectors(array['[1,0,0,0,0,0,0,0]']::halfvec[], generation => 99)", "PT013", "99"),
    ],
)
def test_refusals(connection: psycopg.Connection[Any], statement: str, state: str, words: str) -> None:
    connection.execute("insert into users (user_id) values ('newcomer')")
    with pytest.raises(psycopg.Error) as refused:
        connection.execute(statement)
    assert refused.value.sqlstate == state
    assert words in str(refused.value)


def test_no_vector_holds_nan(connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.DataError, match="NaN not allowed"):
        connection.execute("select * from nearest('[NaN,0,0,0,0,0,0,0]')")


@pytest.mark.parametrize("statement", ["retrieve('ada')", "similar_items('i01')", "user_interests('ada')"])
def test_without_live_generation(connection: psycopg.Connection[Any], statement: str) -> None:
    connection.execute("update generations set state = 'retired'")
    with pytest.raises(psycopg.Error) as refused:
        connection.execute(f"select * from {statement}")
    assert refused.value.sqlstate == "PT001"


def test_item_without_content(connection: psycopg.Connection[Any]) -> None:
    amends(connection)
    connection.execute("update item_embeddings set content_embedding = null where item_id in ('i01', 'i02')")
    with pytest.raises(psycopg.Error) as refused:
        similar(connection, "i01", space="content")
    assert refused.value.sqlstate == "PT011"
    connection.rollback()
    amends(connection)
    connection.execute("update item_embeddings set content_embedding = null where item_id in ('i01', 'i02')")
    assert not {"i01", "i02"} & {row.item_id for row in similar(connection, "i04", k=100, space="content")}


def test_every_sqlstate_is_a_known_problem() -> None:
    raised = set(re.findall(r"errcode = '(PT\d+)'", "".join(path.read_text() for path in SQL.glob("*.sql"))))
    assert raised == PROBLEMS.keys()


@pytest.mark.parametrize("space", ["item", "content", "id"])
def test_similar_items(connection: psycopg.Connection[Any], small: Synthetic, space: str) -> None:
    rows = {"item": small.embedding, "content": small.content, "id": small.identity}[space]
    assert rows is not None
    scores = rows.astype(np.float16).astype(np.float32) @ rows[4].astype(np.float16).astype(np.float32)
    order = [small.item_ids[n] for n in np.argsort(-scores) if small.item_ids[n] not in {"i04", "i03"}]
    found = similar(connection, "i04", k=1000, space=space, titles=True)
    assert [row.item_id for row in found] == order
    assert {row.generation for row in found} == {1}
    assert found[0].title == f"Title {order[0]}"


def test_k_beyond_the_catalogue(connection: psycopg.Connection[Any], small: Synthetic) -> None:
    found = retrieve(connection, "ada", k=1000)
    assert {row.item_id for row in found} == {*small.item_ids} - {"i03", "i01", "i02", "i05"}
    assert len(retrieve(connection, "ada", k=1000, exclude_seen=False)) == 59
    assert len(retrieve(connection, "ada", k=1000, exclude=["i10", "unknown"])) == 55


def test_interests_keep_their_numbers(connection: psycopg.Connection[Any]) -> None:
    amends(connection)
    connection.execute("delete from user_interests where user_id = 'ada' and interest = 1")
    assert {row.interest for row in retrieve(connection, "ada", k=60)} == {0, 2}


def test_user_interests(connection: psycopg.Connection[Any], small: Synthetic) -> None:
    rows = connection.execute("select * from user_interests('ada')").fetchall()
    assert [(row[0], round(row[1], 3), row[4]) for row in rows] == [
        (0, 0.5, 1),
        (1, 0.3, 1),
        (2, 0.2, 1),
    ]
    np.testing.assert_allclose([row[2].to_numpy() for row in rows], small.interests["ada"], atol=1e-3)


def test_strings_are_data(connection: psycopg.Connection[Any], small: Synthetic) -> None:
    tables = "select count(*) from information_schema.tables where table_schema = 'polytower'"
    before = connection.execute(tables).fetchone()
    connection.execute(
        "update items set attributes = %s where item_id = 'i11'", [Jsonb({INJECTION: INJECTION, "$": [INJECTION]})]
    )
    for wanted in (
        {INJECTION: INJECTION},
        {"$": INJECTION},
        {INJECTION: {"any": [INJECTION, "b"]}},
        {"$": {"gte": "x"}},
    ):
        assert [row.item_id for row in retrieve(connection, "bob", filter=wanted)] == ["i11"]
    for call in (
        lambda: retrieve(connection, INJECTION),
        lambda: similar(connection, INJECTION),
        lambda: similar(connection, "i01", space=INJECTION),
        lambda: queries.retrieve(connection, Question.model_construct(user_id="ada", merge=INJECTION)),
        lambda: retrieve(connection, "ada", filter={"no" + INJECTION: 1}),
        lambda: retrieve(connection, "ada", filter={"year": {INJECTION: 1}}),
    ):
        with pytest.raises(psycopg.Error) as refused, connection.transaction():
            call()
        assert refused.value.sqlstate in PROBLEMS
    assert len(retrieve(connection, "ada", k=5, exclude=[INJECTION])) == 5
    assert connection.execute(tables).fetchone() == before


def test_settings_end_with_the_call(connection: psycopg.Connection[Any]) -> None:
    names = ["hnsw.ef_search", "hnsw.iterative_scan", "enable_seqscan", "enable_sort", "search_path"]
    current = "select array_agg(current_setting(name) order by name) from unnest(%s::text[]) name"
    retrieve(connection, "ada")
    before = connection.execute(current, [names]).fetchone()
    connection.execute(
        "select * from walked_lists(searched_space(%s, 8, 'item'), array['[1,0,0,0,0,0,0,0]']::halfvec[], 50, null,"
        " '{}')",
        [1],
    )
    assert connection.execute(current, [names]).fetchone() == before


def test_pinned_to_a_past_generation(connection: psycopg.Connection[Any], small: Synthetic) -> None:
    newer = write_generation(connection, small)
    ask = "select distinct generation from retrieve_vectors(array['[1,0,0,0,0,0,0,0]']::halfvec[], generation => %s)"
    assert connection.execute(ask, [None]).fetchall() == [(newer,)]
    assert connection.execute(ask, [1]).fetchall() == [(1,)]
    promote(connection, 1)
    assert connection.execute(ask, [None]).fetchall() == [(1,)]


def test_one_answer_comes_from_one_generation(own: str, small: Synthetic) -> None:
    """A cursor opened before a promotion goes on reading what it began with."""
    with connect(own) as reader, connect(own) as writer:
        with reader.cursor("slow") as cursor:
            cursor.execute("select generation from retrieve('ada', 50)")
            first = cursor.fetchmany(5)
            newer = write_generation(writer, small)
            writer.commit()
            assert {row[0] for row in first + cursor.fetchall()} == {1}
        reader.commit()
        assert {row.generation for row in retrieve(reader, "ada")} == {newer}


@pytest.fixture
def reader(served: str) -> Iterator[psycopg.Connection[Any]]:
    """Logged in as an analyst: a member of polytower_reader, and nothing else."""
    name = f"analyst_{psycopg.conninfo.conninfo_to_dict(served)['dbname']}"
    quoted = psycopg.sql.Identifier(name)
    with connect(served, autocommit=True) as admin:
        admin.execute(psycopg.sql.SQL("create role {} login password 'reads' in role polytower_reader").format(quoted))
    with connect(psycopg.conninfo.make_conninfo(served, user=name, password="reads")) as opened:
        yield opened
    with connect(served, autocommit=True) as admin:
        admin.execute(psycopg.sql.SQL("drop role {}").format(quoted))


def test_reader_asks_everything_and_writes_nothing(reader: psycopg.Connection[Any]) -> None:
    for question in (
        "retrieve('ada', 5, '{\"genres\": \"Comedy\"}')",
        "retrieve('ada', 5, merge => 'quota')",
        "similar_items('i01', 5, 'content')",
        "nearest('[1,0,0,0,0,0,0,0]', 5)",
        "user_interests('ada')",
    ):
        assert reader.execute(f"select * from polytower.{question}").fetchall()
    reader.commit()
    for statement in (
        "delete from items",
        "update generations set state = 'retired'",
        "create table polytower.mine ()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), reader.transaction():
            reader.execute(statement)


def test_others_may_not_call(reader: psycopg.Connection[Any]) -> None:
    reader.execute("set role none")
    granted = reader.execute(
        "select count(*) filter (where has_function_privilege('public', p.oid, 'execute')), count(*)"
        " from pg_proc p where pronamespace = 'polytower'::regnamespace and proname in"
        " ('retrieve', 'retrieve_vectors', 'nearest', 'similar_items', 'user_interests')"
    ).fetchone()
    assert granted == (0, 8)  # three of them for ids as integers, too

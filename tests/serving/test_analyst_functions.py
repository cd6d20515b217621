"""why, find, interest_overlap, generation_diff, and ids as integers: against numpy, or rows counted by hand."""

from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.generation_factory import Floats, Synthetic, unit, write_generation

Connection = psycopg.Connection[Any]


def _halves(rows: Floats) -> Floats:
    return rows.astype(np.float16).astype(np.float32)


@pytest.fixture
def shelf(connection: Connection) -> Synthetic:
    """Thirty items with integer ids; user 1 has seen five of them, user 2 none. The live generation is the newest."""
    random = np.random.default_rng(5)
    data = Synthetic(
        [str(n) for n in range(30)],
        unit(random.standard_normal((30, 6))),
        {"1": unit(random.standard_normal((3, 6))), "2": unit(random.standard_normal((2, 6)))},
        content=unit(random.standard_normal((30, 6))),
        identity=unit(random.standard_normal((30, 6))),
        seen={"1": ["3", "4", "5", "6", "7", "3"]},
        raw={"text": unit(random.standard_normal((30, 9)))},
    )
    write_generation(connection, data)
    return data


def test_why_names_the_interest_and_the_nearest_of_the_history(connection: Connection, shelf: Synthetic) -> None:
    assert shelf.content is not None
    items, interests = _halves(shelf.embedding), _halves(shelf.interests["1"])
    rows = connection.execute("select * from why('1', '9', 3)").fetchall()
    scores = interests @ items[9]
    best = int(scores.argmax())
    near = sorted([3, 4, 5, 6, 7], key=lambda n: -(items[n] @ items[9]))[:3]
    assert [row[2] for row in rows] == [str(n) for n in near]
    for row, n in zip(rows, near, strict=True):
        assert (row[0], row[3]) == (best, f"Title {n}")
        assert row[1] == pytest.approx(scores[best], abs=1e-5)
        assert row[5] == pytest.approx(items[n] @ items[9], abs=1e-5)
        assert row[6] == pytest.approx(items[n] @ interests[best], abs=1e-5)
        assert {*row[7]} == {"item", "content", "id", "text"}
        assert row[7]["text"] == pytest.approx(
            float(_halves(shelf.raw["text"])[n] @ _halves(shelf.raw["text"])[9]), abs=1e-3
        )
        assert row[7]["content"] == pytest.approx(
            float(_halves(shelf.content)[n] @ _halves(shelf.content)[9]), abs=1e-3
        )
    newest = connection.execute("select max(occurred_at) from interactions where item_id = '3'").fetchone()
    assert newest is not None
    assert [row[4] for row in connection.execute("select * from why('1', '9')") if row[2] == "3"] == [newest[0]]


def test_why_without_a_history_still_names_the_interest(connection: Connection, shelf: Synthetic) -> None:
    (row,) = connection.execute("select * from why('2', '9')").fetchall()
    assert row[1] == pytest.approx((_halves(shelf.interests["2"]) @ _halves(shelf.embedding)[9]).max(), abs=1e-5)
    assert row[2:7] == (None,) * 5


@pytest.mark.parametrize(
    ("call", "state"),
    [
        ("why('nobody', '9')", "PT002"),
        ("why('1', 'nothing')", "PT003"),
        ("why('1', '9', 0)", "PT004"),
        ("interest_overlap('1', 'nobody')", "PT002"),
        ("generation_diff(1, 99)", "PT013"),
        ("generation_diff(1, null)", "PT013"),
        ("retrieve(99)", "PT002"),
    ],
)
def test_refusals(connection: Connection, shelf: Synthetic, call: str, state: str) -> None:
    with pytest.raises(psycopg.Error) as refused:
        connection.execute(f"select * from {call}")
    assert refused.value.sqlstate == state


@pytest.mark.parametrize(
    ("call", "same"),
    [
        ("retrieve(1, 3)", "retrieve('1', 3)"),
        (
            "retrieve(1, merge => 'quota', exclude_seen => false)",
            "retrieve('1', merge => 'quota', exclude_seen => false)",
        ),
        ("similar_items(7, 3, 'text')", "similar_items('7', 3, 'text')"),
        ("user_interests(1)", "user_interests('1')"),
        ("seen_items(1)", "seen_items('1')"),
        ("why(1, 9)", "why('1', '9')"),
        ("interest_overlap(1, 2)", "interest_overlap('1', '2')"),
    ],
)
def test_ids_may_be_integers(connection: Connection, shelf: Synthetic, call: str, same: str) -> None:
    found = connection.execute(f"select * from {call}").fetchall()
    assert found
    assert found == connection.execute(f"select * from {same}").fetchall()


def test_interest_overlap_is_every_pairs_cosine(connection: Connection, shelf: Synthetic) -> None:
    rows = connection.execute("select * from interest_overlap('1', '2')").fetchall()
    cosines = _halves(shelf.interests["1"]) @ _halves(shelf.interests["2"]).T
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)
    assert {row[:2] for row in rows} == {(a, b) for a in range(3) for b in range(2)}
    for a, b, similarity, weight_a, weight_b in rows:
        assert similarity == pytest.approx(cosines[a, b], abs=1e-5)
        assert (weight_a, weight_b) == (pytest.approx(1 / 3), pytest.approx(1 / 2))


def test_find_takes_all_words_titles_first(connection: Connection) -> None:
    rows = [
        ("a", "Star Wars", None),
        ("b", "Star Trek", "wars among the stars"),
        ("c", "STAR WARS: a long way", "space"),
        ("d", "Documentary", "of a star and of wars"),
        ("e", "Nothing", None),
        ("f", None, "étoile"),
    ]
    connection.cursor().executemany("insert into items (item_id, title, description) values (%s, %s, %s)", rows)
    found = connection.execute("select item_id, rank from find('star wars') order by rank").fetchall()
    assert found == [("a", 1), ("c", 2), ("b", 3), ("d", 4)]
    assert [row[0] for row in connection.execute("select * from find('star -trek', 2)")] == ["a", "c"]
    assert [row[0] for row in connection.execute("select * from find('ÉTOILE')")] == ["f"]
    assert connection.execute("select * from find('')").fetchall() == []


def test_generation_diff_counts_and_compares(connection: Connection, shelf: Synthetic) -> None:
    (older,) = connection.execute("select max(generation) from generations").fetchone() or (0,)
    smaller = Synthetic(shelf.item_ids[:20], shelf.embedding[:20], {"1": shelf.interests["1"]}, raw=shelf.raw and {})
    newer = write_generation(connection, smaller)
    for generation, ndcg, epochs in ((older, 0.1, 3), (newer, 0.15, 3)):
        connection.execute(
            "update generations set metrics = %s, config = %s where generation = %s",
            [
                Jsonb({"validation": {"ndcg@10": ndcg}}),
                Jsonb({"preset": "a", "options": {"epochs": epochs}}),
                generation,
            ],
        )
    rows = {
        row[0]: row[1:]
        for row in connection.execute("select * from generation_diff(%s, %s)", [older, newer]).fetchall()
    }
    assert rows["items"] == ("30", "20", -10)
    assert rows["items that the other lacks"] == ("10", "0", -10)
    assert rows["users"] == ("2", "1", -1)
    assert rows["users that the other lacks"] == ("1", "0", -1)
    assert rows["metrics.validation.ndcg@10"] == ("0.1", "0.15", pytest.approx(0.05))
    assert not [name for name in rows if name.startswith("config")]
    assert 0 < float(rows["share of nearest items in both"][0]) < 1
    same = connection.execute("select * from generation_diff(%s, %s)", [newer, newer]).fetchall()
    assert [row[1] for row in same if row[0].startswith("share")] == ["1.000"]
    assert len(same) == 5

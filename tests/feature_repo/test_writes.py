"""Online writes and materialisation: idempotent, whole, and refused where something is wrong or immutable."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from feature_repo.schema import ITEM_ID, USER_ID
from feature_repo.views import VIEWS
from polytower.errors import UserError
from polytower.postgres import connect
from tests.feature_repo import rows
from tests.feature_repo.asked import references, versions
from tests.feature_repo.conftest import Filled


def test_materialising_our_own_history_rewrites_no_row(writable: Filled) -> None:
    before = versions(writable.url)
    writable.store.materialize(rows.day(-1), rows.day(100))
    assert versions(writable.url) == before
    writable.store.materialize_incremental(rows.day(101))
    assert versions(writable.url) == before
    views = {view.name: view for view in writable.store.list_feature_views()}
    assert {view.most_recent_end_time for view in views.values()} == {rows.day(101)}


def test_materialise_brings_lost_rows_back(writable: Filled) -> None:
    tables = {"user_stats": "user_stats", "user_sequence": "user_sequences", "item_attributes": "items"}
    with connect(writable.url) as connection:
        kept = {view: connection.execute(f"select * from {tables[view]}").fetchall() for view in tables}
        for view, table in tables.items():
            connection.execute(f"create table feast.lost as select * from feast.{view}")
            connection.execute(f"drop view feast.{view}")
            connection.execute(f"alter table feast.lost rename to {view}")
            connection.execute(f"delete from {table}")
    writable.store.materialize(rows.day(-1), rows.day(100), feature_views=list(tables))
    with connect(writable.url) as connection:
        written = {view: connection.execute(f"select * from {tables[view]}").fetchall() for view in tables}
        # Feast has nothing about an item's image.
        image = connection.execute("select array_position(array_agg(attname), 'image') - 1 from pg_attribute "
                                   "where attrelid = 'items'::regclass and attnum > 0").fetchone()  # fmt: skip
    assert image is not None
    kept["item_attributes"] = [(*row[: image[0]], None, *row[image[0] + 1 :]) for row in kept["item_attributes"]]
    for view in tables:
        newest: dict[str, Any] = {}
        for row in sorted(kept[view], key=lambda row: row[1] if view.startswith("user") else ""):
            newest[row[0]] = row
        assert sorted(map(str, written[view])) == sorted(map(str, newest.values())), view


def test_materialise_refuses_what_a_write_refuses(writable: Filled) -> None:
    with connect(writable.url) as connection:
        connection.execute("create table feast.other as select * from feast.user_sequence")
        connection.execute("drop view feast.user_sequence")
        connection.execute("alter table feast.other rename to user_sequence")
        connection.execute("update feast.user_sequence set kinds = '{one}' || kinds where user_id = 'u0'")
    before = versions(writable.url)
    with pytest.raises(UserError, match="the lists of 'u0' are of unequal lengths"):
        writable.store.materialize(rows.day(-1), rows.day(100), feature_views=["user_sequence"])
    assert versions(writable.url) == before


def test_materialise_refuses_other_embeddings(writable: Filled) -> None:
    from feature_repo.stores.engine import take

    source = "select * from feast.item_embedding where as_of = (select max(live_from) from polytower.promotions)"
    other = "select item_id, as_of, array[9, 9, 9, 9]::real[] as embedding, content_embedding, id_embedding,"
    with connect(writable.url) as connection:
        assert take(connection, VIEWS["item_embedding"], source) == 0
        with pytest.raises(UserError, match="'item_embedding' is immutable and the row of '' differs"):
            take(connection, VIEWS["item_embedding"], f"{other} embedding_generation from ({source}) as held")


def test_a_written_sequence_is_read_back(writable: Filled) -> None:
    import pandas as pd

    moment = rows.day(50.5)
    items = ["", "☃", "a\x1fb", "c\x1ed", "e\x1df", "NULL", 'x"y\\{,}']
    frame = pd.DataFrame(
        {
            USER_ID: ["new", "u0"],
            "item_ids": [items, []],
            "occurred_ats": [[rows.micros(moment) + step for step in range(len(items))], []],
            "kinds": [["view"] * len(items), []],
            "queries": [["", "ü", *[""] * (len(items) - 2)], []],
            "as_of": [moment, moment],
        }
    )
    writable.store.write_to_online_store("user_sequence", frame)
    refs, wanted = references("user_sequence"), {USER_ID: ["new", "u0"]}
    answer = writable.store.get_online_features(features=refs, entity_rows=wanted).to_dict()
    assert answer["item_ids"] == [items, []]
    assert answer["occurred_ats"] == frame["occurred_ats"].tolist()
    assert answer["kinds"] == [["view"] * len(items), []]
    assert answer["queries"] == frame["queries"].tolist()

    before = versions(writable.url)
    writable.store.write_to_online_store("user_sequence", frame)
    writable.store.write_to_online_store(
        "user_sequence", frame.assign(as_of=moment - timedelta(hours=1), kinds=frame["item_ids"])
    )
    assert versions(writable.url) == before, "neither the same row nor an older one of that day replaces it"


def test_the_newest_of_one_batch_wins(writable: Filled) -> None:
    import pandas as pd

    moments = [rows.day(50) + timedelta(hours=hour) for hour in (2, 3, 1)]
    frame = pd.DataFrame(
        {
            ITEM_ID: ["i0"] * 3,
            "item_interactions": [2, 3, 1],
            "item_distinct_users": [1, 1, 1],
            "item_mean_value": [0.5, float("nan"), 0.5],
            "item_first_at": [rows.micros(rows.day(1)) + 7] * 3,
            "as_of": moments,
        }
    )
    writable.store.write_to_online_store("item_stats", frame)
    with connect(writable.url) as connection:
        written = connection.execute(
            "select interactions, mean_value, first_at, as_of from item_stats where item_id = 'i0' and day = %s",
            [moments[0].date()],
        ).fetchall()
    assert written == [(3, None, rows.day(1) + timedelta(microseconds=7), moments[1])]


def test_two_writers_of_one_new_row(writable: Filled) -> None:
    """Both look and find nothing; the second meets the first one's row in the index, and the newer row stays."""
    import pandas as pd

    moment = rows.day(50)
    values = {"user_interactions": 7, "user_distinct_items": 7, "user_mean_value": 0.5, "user_first_at": 1}
    frame = pd.DataFrame([{USER_ID: each, **values, "as_of": moment} for each in ("fresh", "new")])
    with connect(writable.url) as other, ThreadPoolExecutor() as threads:
        other.execute(
            "insert into user_stats values ('new', %s, %s, 9, 9, 9, %s)", [moment.date(), moment, rows.day(1)]
        )
        written = threads.submit(writable.store.write_to_online_store, "user_stats", frame)
        with connect(writable.url, autocommit=True) as watching:
            waits = (
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
            )
            while not watching.execute(waits).fetchall()[0][0]:
                assert not written.done()
        other.commit()
        written.result()
    with connect(writable.url) as connection:
        kept = connection.execute("select user_id, interactions from user_stats where as_of = %s order by 1", [moment])
        assert kept.fetchall() == [("fresh", 7), ("new", 7)]


def test_item_attributes_keep_what_feast_does_not_know(writable: Filled) -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {
            ITEM_ID: ["i1", "brand new"],
            "title": ["Ünïcode ☃", None],
            "description": [None, "d"],
            "available": [False, True],
            "attributes": ['{"a": [1, "☃"]}', "{}"],
            "as_of": [rows.day(60)] * 2,
        }
    )
    writable.store.write_to_online_store("item_attributes", frame)
    with connect(writable.url) as connection:
        written = connection.execute(
            "select item_id, title, description, image, available, attributes from items "
            "where updated_at = %s order by 1",
            [rows.day(60)],
        ).fetchall()
    assert written == [
        ("brand new", None, "d", None, True, {}),
        ("i1", "Ünïcode ☃", None, "1.jpg", False, {"a": [1, "☃"]}),
    ]


@pytest.mark.parametrize("view", ["item_embedding", "user_interests", "item_content"])
def test_embeddings_are_immutable(writable: Filled, view: str) -> None:
    frame = writable.store.get_historical_features(entity_df=_now_frame(view), features=references(view)).to_df()
    frame = frame.rename(columns={"event_timestamp": "as_of"})
    before = versions(writable.url)
    writable.store.write_to_online_store(view, frame)
    assert versions(writable.url) == before
    vectors = next(name for name in ("embedding", "interests", "text_embedding") if name in frame)
    changed = frame.assign(**{vectors: [list(vector * 2) for vector in frame[vectors]]})
    with pytest.raises(UserError, match=r"immutable and the row of 'i0'|immutable and the row of 'u0'"):
        writable.store.write_to_online_store(view, changed)
    assert versions(writable.url) == before


def _now_frame(view: str) -> Any:
    import pandas as pd

    key, ids = (USER_ID, ["u0"]) if view == "user_interests" else (ITEM_ID, ["i0", "ï☃"])
    return pd.DataFrame({key: ids, "event_timestamp": [rows.day(70)] * len(ids)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"item_ids": ["a", "b"], "occurred_ats": [1], "kinds": ["k", "k"], "queries": []}, "unequal lengths"),
        ({"item_ids": ["a", "b"], "occurred_ats": [1, 2], "kinds": ["k", "k"], "queries": [""]}, "unequal lengths"),
        ({"item_ids": None, "occurred_ats": [1], "kinds": ["k"], "queries": []}, "null value in column"),
        ({"item_ids": ["a\x00b"], "occurred_ats": [1], "kinds": ["k"], "queries": []}, "refuses the rows"),
    ],
)
def test_a_bad_sequence_is_refused_whole(writable: Filled, values: dict[str, Any], message: str) -> None:
    import pandas as pd

    good = {"item_ids": ["a"], "occurred_ats": [1], "kinds": ["k"], "queries": []}
    frame = pd.DataFrame(
        [{USER_ID: "good", **good, "as_of": rows.day(50)}, {USER_ID: "bad", **values, "as_of": rows.day(50)}]
    )
    before = versions(writable.url)
    with pytest.raises(UserError, match=message):
        writable.store.write_to_online_store("user_sequence", frame)
    assert versions(writable.url) == before


def test_a_row_of_another_type_or_view_is_refused(writable: Filled) -> None:
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    store = writable.store
    online, view = store._get_provider().online_store, store.get_feature_view("user_stats")
    key = EntityKey(join_keys=[USER_ID], entity_values=[Value(string_val="u0")])
    values = {name.partition(":")[2]: Value(int64_val=1) for name in references("user_stats")}
    with pytest.raises(UserError, match="'user_mean_value' takes double_val, and a row brings int64_val"):
        online.online_write_batch(store.config, view, [(key, values, rows.day(1), None)], None)
    values.pop("user_mean_value")
    with pytest.raises(UserError, match="lacks the feature 'user_mean_value'"):
        online.online_write_batch(store.config, view, [(key, values, rows.day(1), None)], None)
    view.name = "other"
    with pytest.raises(UserError, match="'other' has no table behind it"):
        online.online_write_batch(store.config, view, [(key, values, rows.day(1), None)], None)


def test_teardown_leaves_the_tables(writable: Filled) -> None:
    before = versions(writable.url)
    writable.store.teardown()
    assert versions(writable.url) == before

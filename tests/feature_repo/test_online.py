"""Online features: Feast answers what the tables hold, on both of its paths; writes are idempotent or refused."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from feature_repo.schema import FEATURE_VIEWS, ITEM_ID, SERVICES, USER_ID
from polytower.errors import UserError
from polytower.postgres import connect
from serving.rank.features import UnknownServiceError, fetch_features, json_rows
from tests.feature_repo import rows
from tests.feature_repo.conftest import Filled

TABLES = (
    "user_sequences",
    "user_stats",
    "item_stats",
    "items",
    "content_embeddings",
    "item_embeddings",
    "user_interests",
)


def _key(view: str) -> tuple[str, list[str]]:
    """The view's key and entities to ask for: all, one twice, one unknown."""
    users = view.startswith("user")
    known = rows.USERS if users else rows.ITEMS
    return USER_ID if users else ITEM_ID, [*reversed(known), known[2], "nobody"]


def _refs(filled: Filled, view: str) -> list[str]:
    return [f"{view}:{field.name}" for field in filled.store.get_feature_view(view).features]


def _expected(filled: Filled, view: str, ids: list[str]) -> dict[str, list[Any]]:
    names = [field.name for field in filled.store.get_feature_view(view).features]
    found = [rows.newest(filled.history, view, each) for each in ids]
    return {name: [None if row is None else row[1][name] for row in found] for name in names}


def _parsed(answer: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if "attributes" in answer:
        answer["attributes"] = [None if each is None else json.loads(each) for each in answer["attributes"]]
    return answer


def _write(filled: Filled, view: str, frame: Any) -> None:
    filled.store.write_to_online_store(view, frame)


def _fetched(filled: Filled, service: str, entities: dict[str, Any]) -> Any:
    with connect(filled.url) as connection:
        return fetch_features(connection, service, entities)


def _versions(url: str) -> list[Any]:
    """Every row with the transaction that wrote it: a rewritten row shows, even with equal values."""
    with connect(url) as connection:
        return [
            connection.execute(f"select xmin::text, t::text from {table} as t order by 2").fetchall()
            for table in TABLES
        ]


@pytest.mark.parametrize("view", FEATURE_VIEWS)
def test_online_equals_the_tables(filled: Filled, view: str) -> None:
    key, ids = _key(view)
    answer = filled.store.get_online_features(features=_refs(filled, view), entity_rows={key: ids})
    columns = _parsed(answer.to_dict())
    assert columns.pop(key) == ids
    assert columns == _expected(filled, view, ids)


@pytest.mark.parametrize("view", FEATURE_VIEWS)
def test_both_paths_give_the_same_protobuf(filled: Filled, view: str) -> None:
    """Ours (columns) and Feast's own (cells), which a request for version metadata takes."""
    key, ids = _key(view)
    refs, entities = _refs(filled, view), [{key: each} for each in ids]
    ours = filled.store.get_online_features(features=refs, entity_rows=entities)
    feasts = filled.store.get_online_features(
        features=refs, entity_rows=entities, include_feature_view_version_metadata=True
    )
    assert type(ours) is not type(feasts)
    assert ours.proto.results == feasts.proto.results
    assert list(ours.proto.metadata.feature_names.val) == list(feasts.proto.metadata.feature_names.val)
    assert ours.to_dict(include_event_timestamps=True) == feasts.to_dict(include_event_timestamps=True)
    assert ours.to_df().equals(feasts.to_df())


def test_full_names_and_statuses(filled: Filled) -> None:
    answer = filled.store.get_online_features(
        features=["user_stats:user_interactions"], entity_rows={USER_ID: ["nobody", "u0"]}, full_feature_names=True
    )
    interactions = rows.newest(filled.history, "user_stats", "u0")
    assert interactions is not None
    assert answer.to_dict()["user_stats__user_interactions"] == [None, interactions[1]["user_interactions"]]
    from feast.protos.feast.serving.ServingService_pb2 import NOT_FOUND, PRESENT

    assert [list(result.statuses) for result in answer.proto.results] == [[PRESENT, PRESENT], [NOT_FOUND, PRESENT]]


def test_to_tensor_brings_torch_late(filled: Filled) -> None:
    answer = filled.store.get_online_features(
        features=["user_stats:user_interactions"], entity_rows={USER_ID: ["u0", "u1"]}
    )
    assert answer.to_tensor()["user_interactions"].tolist() == answer.to_dict()["user_interactions"]


def test_missing_join_key_is_feasts_error(filled: Filled) -> None:
    with pytest.raises(KeyError, match="user_id"):
        filled.store.get_online_features(features=["user_stats:user_interactions"], entity_rows={ITEM_ID: ["i0"]})


def test_materialising_our_own_history_rewrites_no_row(writable: Filled) -> None:
    before = _versions(writable.url)
    writable.store.materialize(rows.day(-1), rows.day(100))
    assert _versions(writable.url) == before
    writable.store.materialize_incremental(rows.day(101))
    assert _versions(writable.url) == before
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
    before = _versions(writable.url)
    with pytest.raises(UserError, match="the sequence of user 'u0' has lists of unequal lengths"):
        writable.store.materialize(rows.day(-1), rows.day(100), feature_views=["user_sequence"])
    assert _versions(writable.url) == before


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
    _write(writable, "user_sequence", frame)
    refs, wanted = _refs(writable, "user_sequence"), {USER_ID: ["new", "u0"]}
    answer = writable.store.get_online_features(features=refs, entity_rows=wanted).to_dict()
    assert answer["item_ids"] == [items, []]
    assert answer["occurred_ats"] == frame["occurred_ats"].tolist()
    assert answer["kinds"] == [["view"] * len(items), []]
    assert answer["queries"] == frame["queries"].tolist()

    before = _versions(writable.url)
    _write(writable, "user_sequence", frame)
    _write(writable, "user_sequence", frame.assign(as_of=moment - timedelta(hours=1), kinds=frame["item_ids"]))
    assert _versions(writable.url) == before, "neither the same row nor an older one of that day replaces it"


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
    _write(writable, "item_stats", frame)
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
        written = threads.submit(_write, writable, "user_stats", frame)
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
    _write(writable, "item_attributes", frame)
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
    frame = writable.store.get_historical_features(entity_df=_now_frame(view), features=_refs(writable, view)).to_df()
    frame = frame.rename(columns={"event_timestamp": "as_of"})
    before = _versions(writable.url)
    _write(writable, view, frame)
    assert _versions(writable.url) == before
    vectors = next(name for name in ("embedding", "interests", "text_embedding") if name in frame)
    changed = frame.assign(**{vectors: [list(vector * 2) for vector in frame[vectors]]})
    with pytest.raises(UserError, match=r"immutable and the row of 'i0'|immutable and the row of 'u0'"):
        _write(writable, view, changed)
    assert _versions(writable.url) == before


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
    before = _versions(writable.url)
    with pytest.raises(UserError, match=message):
        _write(writable, "user_sequence", frame)
    assert _versions(writable.url) == before


def test_a_row_of_another_type_or_view_is_refused(writable: Filled) -> None:
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    store = writable.store
    online, view = store._get_provider().online_store, store.get_feature_view("user_stats")
    key = EntityKey(join_keys=[USER_ID], entity_values=[Value(string_val="u0")])
    values = {name.partition(":")[2]: Value(int64_val=1) for name in _refs(writable, "user_stats")}
    with pytest.raises(UserError, match="'user_mean_value' takes double_val, and a row brings int64_val"):
        online.online_write_batch(store.config, view, [(key, values, rows.day(1), None)], None)
    values.pop("user_mean_value")
    with pytest.raises(UserError, match="lacks the feature 'user_mean_value'"):
        online.online_write_batch(store.config, view, [(key, values, rows.day(1), None)], None)
    view.name = "other"
    with pytest.raises(UserError, match="'other' has no table behind it"):
        online.online_write_batch(store.config, view, [(key, values, rows.day(1), None)], None)


def test_teardown_leaves_the_tables(writable: Filled) -> None:
    before = _versions(writable.url)
    writable.store.teardown()
    assert _versions(writable.url) == before


def test_a_promotion_shows_at_once(writable: Filled) -> None:
    refs, wanted = ["item_embedding:embedding_generation"], {ITEM_ID: ["i0"]}
    assert writable.store.get_online_features(refs, wanted).to_dict()["embedding_generation"] == [1]
    with connect(writable.url) as connection:
        connection.execute("update generations set state = 'retired' where generation = 1")
        connection.execute("update generations set state = 'live' where generation = 2")
        connection.execute("update promotions set live_until = now() where live_until is null")
        connection.execute("insert into promotions (generation) values (2)")
    assert writable.store.get_online_features(refs, wanted).to_dict()["embedding_generation"] == [2]


def test_no_live_generation_means_absent(writable: Filled) -> None:
    with connect(writable.url) as connection:
        connection.execute("update generations set state = 'retired' where generation = 1")
    answer = writable.store.get_online_features(["item_embedding:embedding"], {ITEM_ID: ["i0"]})
    assert answer.to_dict()["embedding"] == [None]


def test_the_online_read_of_embeddings_uses_the_live_partition_only(filled: Filled) -> None:
    from feature_repo.views.online_reads import query

    with connect(filled.url) as connection:
        explained = b"explain (analyze) " + query("item_embedding", ("embedding",))
        plan = "\n".join(row[0] for row in connection.execute(explained, {"ids": ["i0"]}))
    assert plan.count("never executed") == 2, plan


def test_fetch_features_broadcasts_one_user_over_the_candidates(filled: Filled) -> None:
    candidates = ["i0", "nothing", "i1"]
    table = _fetched(filled, "ranker", {USER_ID: ["u0"], ITEM_ID: candidates})
    assert table.column_names[:2] == [USER_ID, ITEM_ID]
    assert table[ITEM_ID].to_pylist() == candidates
    assert table[USER_ID].to_pylist() == ["u0"] * 3
    for view in FEATURE_VIEWS:
        ids = ["u0"] * 3 if view.startswith("user") else candidates
        for name, values in _expected(filled, view, ids).items():
            assert _parsed({name: table[name].to_pylist()})[name] == values
    assert [row[ITEM_ID] for row in json_rows(table)] == candidates


def test_arrow_types_do_not_depend_on_values(filled: Filled) -> None:
    absent = _fetched(filled, "ranker", {USER_ID: ["nobody"], ITEM_ID: ["nothing"]})
    there = _fetched(filled, "ranker", {USER_ID: ["u0"], ITEM_ID: ["i0"]})
    assert absent.schema == there.schema


@pytest.mark.parametrize("service", SERVICES)
def test_fetch_features_equals_feasts_answer(filled: Filled, service: str) -> None:
    """Column by column, types included; and in the order of the definitions, which Feast's services lose."""
    users, items = _key("user_stats")[1], _key("item_stats")[1]
    size = max(len(users), len(items))
    entities = {USER_ID: (users * size)[:size], ITEM_ID: (items * size)[:size]}
    if service == "retrieval":
        del entities[ITEM_ID]
    table = _fetched(filled, service, entities)
    feasts = filled.store.get_online_features(filled.store.get_feature_service(service), entities).to_arrow()
    assert table.equals(feasts.select(table.column_names))
    views = [filled.store.get_feature_view(name) for name in SERVICES[service]]
    assert table.column_names == [*entities, *(field.name for view in views for field in view.features)]
    assert sorted(feasts.column_names) == sorted(table.column_names)


def test_fetching_features_leaves_feast_alone() -> None:
    script = "import sys, serving.http.app, serving.rank.features; print({'feast', 'torch', 'pandas'} & {*sys.modules})"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("service", "entities", "message"),
    [
        ("rankr", {USER_ID: ["u0"]}, "no feature service 'rankr'; there are ranker, retrieval"),
        ("retrieval", {ITEM_ID: ["i0"]}, "takes user_id; given: item_id"),
        ("retrieval", {}, "given: nothing"),
        ("retrieval", {USER_ID: []}, "at least one"),
        ("retrieval", {USER_ID: "u0"}, "takes a list of ids"),
        ("retrieval", {USER_ID: ["u0", 7]}, "each a string"),
        ("ranker", {USER_ID: ["u0", "u1"], ITEM_ID: ["i0", "i1", "i6"]}, "user_id: 2, item_id: 3"),
        ("retrieval", {USER_ID: ["u0"] * 5001}, "5001 rows are asked for, and one answer has at most 5000"),
    ],
)
def test_unusable_requests_are_the_users_errors(
    filled: Filled, service: str, entities: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        _fetched(filled, service, entities)
    assert isinstance(raised.value, UnknownServiceError) == (service == "rankr")

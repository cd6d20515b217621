"""Features for rankers, without Feast: its answers, column by column."""

import subprocess
import sys
from typing import Any

import pytest

from feature_repo.schema import ITEM_ID, SERVICES, USER_ID
from feature_repo.views import VIEWS, views_of
from polytower.errors import UserError
from serving.rank.features import UnknownServiceError, json_rows
from tests.feature_repo.asked import entities_of, expected, fetched, parsed
from tests.feature_repo.conftest import Filled


def test_fetch_features_broadcasts_one_user_over_the_candidates(filled: Filled) -> None:
    candidates = ["i0", "nothing", "i1"]
    table = fetched(filled, "ranker", {USER_ID: ["u0"], ITEM_ID: candidates})
    assert table.column_names[:2] == [USER_ID, ITEM_ID]
    assert table[ITEM_ID].to_pylist() == candidates
    assert table[USER_ID].to_pylist() == ["u0"] * 3
    for view in VIEWS:
        ids = ["u0"] * 3 if VIEWS[view].key == USER_ID else candidates
        for name, values in expected(filled, view, ids).items():
            assert parsed({name: table[name].to_pylist()})[name] == values
    assert [row[ITEM_ID] for row in json_rows(table)] == candidates


def test_arrow_types_do_not_depend_on_values(filled: Filled) -> None:
    absent = fetched(filled, "ranker", {USER_ID: ["nobody"], ITEM_ID: ["nothing"]})
    there = fetched(filled, "ranker", {USER_ID: ["u0"], ITEM_ID: ["i0"]})
    assert absent.schema == there.schema


@pytest.mark.parametrize("service", SERVICES)
def test_fetch_features_equals_feasts_answer(filled: Filled, service: str) -> None:
    """Column by column, types included; and in the order of the definitions, which Feast's services lose."""
    users, items = entities_of("user_stats")[1], entities_of("item_stats")[1]
    size = max(len(users), len(items))
    entities = {USER_ID: (users * size)[:size], ITEM_ID: (items * size)[:size]}
    if service == "retrieval":
        del entities[ITEM_ID]
    table = fetched(filled, service, entities)
    feasts = filled.store.get_online_features(filled.store.get_feature_service(service), entities).to_arrow()
    assert table.equals(feasts.select(table.column_names))
    assert table.column_names == [*entities, *(name for view in views_of(service) for name in view.kinds)]
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
        fetched(filled, service, entities)
    assert isinstance(raised.value, UnknownServiceError) == (service == "rankr")

"""Training sets: every row gets what was true at its time, against a plain-Python reference."""

import json
from bisect import bisect_left
from datetime import datetime, timedelta
from random import Random
from typing import Any

import pytest

from feature_repo.schema import ITEM_ID, USER_ID
from feature_repo.views import VIEWS
from polytower.errors import UserError
from tests.feature_repo import rows
from tests.feature_repo.conftest import Filled


def _moments(filled: Filled, random: Random, count: int) -> list[datetime]:
    """Random times, half of them at, just before or just after a change."""
    changes = [as_of for view in filled.history.values() for each in view.values() for as_of, _ in each]
    near = [random.choice(changes) + timedelta(microseconds=random.choice([-1, 0, 1])) for _ in range(count // 2)]
    return near + [rows.day(random.uniform(-5, 50)) for _ in range(count - len(near))]


def _frame(filled: Filled, seed: int, count: int = 150) -> Any:
    import pandas as pd

    random = Random(seed)
    return pd.DataFrame(
        {
            USER_ID: [random.choice([*rows.USERS, "nobody"]) for _ in range(count)],
            ITEM_ID: [random.choice([*rows.ITEMS, "nothing"]) for _ in range(count)],
            "event_timestamp": pd.to_datetime(_moments(filled, random, count), utc=True).astype("datetime64[us, UTC]"),
            "label": [random.random() for _ in range(count)],
        }
    )


def _plain(value: Any) -> Any:
    """pandas' cells as Python values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return None if value is None or value != value else value


def _expected(filled: Filled, view: str, entity: str, moment: datetime, name: str) -> Any:
    if view == "user_sequence":
        # All events before the moment, also those of its own day; the newest row of the history holds all of them.
        whole = rows.newest(filled.history, view, entity)
        before = 0 if whole is None else bisect_left(whole[1]["occurred_ats"], rows.micros(moment))
        told = whole[1][name][:before] if whole is not None and before else None
        return [] if name == "queries" and told and not any(told) else told
    # Statistics include the event that they are dated by, which therefore must lie before the moment.
    latest = moment - timedelta(microseconds=1) if view.endswith("_stats") else moment
    found = rows.newest(filled.history, view, entity, latest)
    return None if found is None else found[1][name]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_ranker_s_training_set_equals_the_reference(filled: Filled, seed: int) -> None:
    entities = _frame(filled, seed)
    job = filled.store.get_historical_features(entities, filled.store.get_feature_service("ranker"))
    answer = job.to_df()
    assert len(answer) == len(entities)
    fields = [(view.name, name) for view in VIEWS.values() for name in view.kinds]
    by_label = {row["label"]: row for row in answer.to_dict("records")}
    compared = 0
    for wanted in entities.to_dict("records"):
        got = by_label[wanted["label"]]
        for view, name in fields:
            entity = wanted[USER_ID if view.startswith("user") else ITEM_ID]
            value = _plain(got[name])
            if name.endswith("attributes") and value is not None:
                value = json.loads(value)
            assert value == _expected(filled, view, entity, wanted["event_timestamp"].to_pydatetime(), name)
            compared += value is not None
    assert compared > 500, "the frame hits almost nothing: the test would prove little"


def test_embeddings_follow_the_generation_that_was_live(filled: Filled) -> None:
    """Generation 1, then 2, then 1 again; who is only in 2 loses the embedding with the rollback."""
    import pandas as pd

    days = [9.9, 10, 19.9, 20, 29.9, 30, 99]
    only_in_2 = rows.ITEMS[7]
    frame = pd.DataFrame(
        {
            ITEM_ID: ["i0"] * len(days) + [only_in_2] * len(days),
            "event_timestamp": [rows.day(number) for number in days] * 2,
        }
    )
    answer = filled.store.get_historical_features(frame, ["item_embedding:embedding_generation"]).to_df()
    answer = answer.sort_values("event_timestamp")
    generations = {
        item: [_plain(each) for each in answer[answer[ITEM_ID] == item]["embedding_generation"]]
        for item in ("i0", only_in_2)
    }
    assert generations == {"i0": [None, 1, 1, 2, 2, 1, 1], only_in_2: [None, None, None, 2, 2, None, None]}


def test_a_long_sequence_keeps_its_newest_events(writable: Filled) -> None:
    """150 events by yesterday, 200 kept of today's: before the 120th of those, the newest 200 of both."""
    import pandas as pd

    from polytower.postgres import connect

    yesterday = [rows.day(60) + timedelta(minutes=minute) for minute in range(150)]
    today = [rows.day(61) + timedelta(minutes=minute) for minute in range(200)]
    with connect(writable.url) as connection:
        for moments, name in ((yesterday, "y"), (today, "t")):
            items = [f"{name}{place}" for place in range(len(moments))]
            connection.execute(
                "insert into user_sequences values ('long', %s, %s, %s, %s, %s)",
                [moments[0].date(), moments[-1], items, moments, items],
            )
    # Times without a zone are UTC.
    frame = pd.DataFrame({USER_ID: ["long"], "event_timestamp": [today[120].replace(tzinfo=None)]})
    answer = writable.store.get_historical_features(frame, ["user_sequence:item_ids"], full_feature_names=True).to_df()
    expected = [f"y{place}" for place in range(70, 150)] + [f"t{place}" for place in range(120)]
    assert _plain(answer["user_sequence__item_ids"][0]) == expected


def test_entities_may_come_from_a_query(filled: Filled) -> None:
    query = "select 'u0' as user_id, timestamptz '2026-05-01' as event_timestamp"
    answer = filled.store.get_historical_features(query, ["user_stats:user_interactions"]).to_df()
    assert answer["user_interactions"].tolist() == [
        _expected(filled, "user_stats", "u0", rows.day(61), "user_interactions")
    ]


def test_a_frame_without_keys_or_rows_is_refused(filled: Filled) -> None:
    import pandas as pd
    from feast.errors import FeastEntityDFMissingColumnsError

    frame = pd.DataFrame({ITEM_ID: ["i0"], "event_timestamp": [rows.day(9)]})
    with pytest.raises(FeastEntityDFMissingColumnsError, match="user_id"):
        filled.store.get_historical_features(frame, ["user_stats:user_interactions"])
    with pytest.raises(UserError, match="no rows"):
        filled.store.get_historical_features(frame[:0], ["item_stats:item_interactions"])


def test_dropped_generations_leave_nothing(writable: Filled) -> None:
    import pandas as pd

    from polytower.postgres import connect

    with connect(writable.url) as connection:
        connection.execute("drop table item_embeddings_g2")
    frame = pd.DataFrame({ITEM_ID: ["i0"] * 2, "event_timestamp": [rows.day(15), rows.day(25)]})
    answer = writable.store.get_historical_features(frame, ["item_embedding:embedding_generation"]).to_df()
    assert [_plain(each) for each in answer.sort_values("event_timestamp")["embedding_generation"]] == [1, None]

"""Training sets of a past that was recorded later: content as it is now, generations that were trained before."""

from typing import Any

import pytest

from feature_repo.schema import ITEM_ID, POINT_IN_TIME, USER_ID
from polytower.errors import UserError
from polytower.postgres import connect
from tests.feature_repo import rows
from tests.feature_repo.conftest import Filled

GENERATIONS = ["embedding_generation", "interests_generation"]


@pytest.fixture
def trained(writable: Filled) -> Filled:
    """Generations 1 and 2 know nothing from days 12 and 22 on; 2 was promoted on day 20, which does not matter."""
    with connect(writable.url) as connection:
        for generation, day in ((1, 12), (2, 22)):
            connection.execute(
                "update generations set trained_before = %s where generation = %s", [rows.day(day), generation]
            )
    return writable


def ask(filled: Filled, days: list[float], mode: Any = "backfilled", item: str = "i0") -> Any:
    """The ranker's features of one user and item at these days, in their order."""
    import pandas as pd

    frame = pd.DataFrame(
        {
            USER_ID: "u0",
            ITEM_ID: item,
            "event_timestamp": [rows.day(number) for number in days],
            "place": range(len(days)),
            POINT_IN_TIME: mode,
        }
    )
    answer = filled.store.get_historical_features(frame, filled.store.get_feature_service("ranker")).to_df()
    return answer.sort_values("place")


def known(values: Any) -> list[int | None]:
    return [None if value != value else int(value) for value in values]


def test_the_newest_generation_that_knew_nothing_of_the_event(trained: Filled) -> None:
    days = [-5, 11.999, 12, 21.999, 22, 99]
    answer = ask(trained, days)
    for name in GENERATIONS:
        assert known(answer[name]) == [None, None, 1, 1, 2, 2]
    assert list(answer[POINT_IN_TIME]) == ["backfilled"] * len(days)
    strict = ask(trained, days, "strict")
    assert known(strict["embedding_generation"]) == [None, 1, 1, 2, 2, 1]


def test_a_generation_that_knows_the_label_is_never_taken(trained: Filled) -> None:
    """The leak test: the newest, best and only other one is trained an instant too late, or on everything."""
    with connect(trained.url) as connection:
        connection.execute("update generations set trained_before = null where generation = 1")
        connection.execute(
            "update generations set trained_before = %s + interval '1 microsecond' where generation = 2", [rows.day(30)]
        )
    for name in GENERATIONS:
        assert known(ask(trained, [30, 31])[name]) == [None, 2]
    with connect(trained.url) as connection:
        connection.execute("update generations set state = 'failed' where generation = 2")
    for name in GENERATIONS:
        assert known(ask(trained, [30, 31])[name]) == [None, None]


def test_a_dropped_generation_gives_way_to_the_one_before(trained: Filled) -> None:
    with connect(trained.url) as connection:
        connection.execute("drop table item_embeddings_g2")
    for name in GENERATIONS:
        assert known(ask(trained, [22, 99])[name]) == [1, 1]


def test_content_is_as_it_is_now_and_events_are_not(trained: Filled) -> None:
    item = next(
        item for item, found in trained.history["item_attributes"].items()
        if found[-1][1]["title"] and rows.newest(trained.history, "item_content", item) is not None
    )  # fmt: skip
    early = [-100.0]
    strict, backfilled = (ask(trained, early, mode, item) for mode in ("strict", "backfilled"))
    assert strict["title"].isna().all()
    assert list(backfilled["title"]) == [trained.history["item_attributes"][item][-1][1]["title"]]
    content = [name for name in backfilled.columns if name.endswith("_embedding") and name.split("_")[0] in
               ("text", "image", "attributes", "vector")]  # fmt: skip
    assert strict[content].isna().all(axis=None)
    assert not backfilled[content].isna().all(axis=None)
    events = ["item_ids", "user_interactions", "item_interactions"]
    assert backfilled[events].isna().all(axis=None)  # nothing had happened yet
    late = [99.0]
    strict, backfilled = (ask(trained, late, mode, item) for mode in ("strict", "backfilled"))
    for name in events:
        assert str(list(strict[name])) == str(list(backfilled[name]))


def test_one_word_for_all_rows(trained: Filled) -> None:
    for modes in (["strict", "backfilled"], ["yes", "yes"], [None, None]):
        with pytest.raises(UserError, match=r"point_in_time has .*strict .* or backfilled"):
            ask(trained, [1, 2], modes)
    query = "select 'i0' as item_id, timestamptz '2026-03-13' as event_timestamp, {} as point_in_time"
    wanted = ["item_embedding:embedding_generation"]
    answer = trained.store.get_historical_features(query.format("'backfilled'"), wanted).to_df()
    assert known(answer["embedding_generation"]) == [1]
    with pytest.raises(UserError, match="point_in_time has no"):
        trained.store.get_historical_features(query.format("'no'"), wanted)

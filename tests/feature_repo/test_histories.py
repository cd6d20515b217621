"""A user's history is one thing: what the towers learn from is what the feature `user_sequence` holds, at any time."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest

from feature_repo.schema import SEQUENCE_LENGTH, USER_ID
from feature_repo.store import apply, close, feature_store
from feature_repo.views.user_sequence import ORDER, newest_events
from pipelines.generation.training_set import read_catalogue, read_histories
from pipelines.sequences import changed_days, refresh_sequences
from polytower.postgres import connect
from tests.conftest import cloned

START = datetime(2023, 12, 28, tzinfo=UTC)
ITEMS = [f"i{n}" for n in range(30)]
USERS = ["often", "tied", *(f"u{n}" for n in range(12))]

Event = tuple[str, str, datetime, str]


def _events(random: Random) -> list[Event]:
    """Over ten days and a new year: "often" has more than a sequence holds, "tied" all events at few moments."""
    events = []
    for user in USERS:
        count = 3 * SEQUENCE_LENGTH if user == "often" else 60
        step = timedelta(hours=8) if user == "tied" else timedelta(microseconds=1)
        for _ in range(count):
            moment = START + random.randrange(timedelta(days=10) // step) * step
            events.append((user, random.choice(ITEMS), moment, random.choice(["view", "buy"])))
    return list(dict.fromkeys(events))


@pytest.fixture(scope="module")
def log(server: str) -> Iterator[tuple[str, Any]]:
    """(URL, Feast over it): events in two batches of any order, so that some of the second are late."""
    random = Random(0)
    with cloned(server, "histories") as url:
        with connect(url) as connection:
            connection.execute("insert into items (item_id) select unnest(%s::text[])", [ITEMS])
            connection.execute("select ensure_interactions_year(year) from unnest(array[2023, 2024]) as year")
            events = _events(random)
            for half in (events[::2], events[1::2]):
                with connection.cursor() as cursor:
                    cursor.executemany(
                        "insert into interactions (user_id, item_id, occurred_at, kind) values (%s, %s, %s, %s)", half
                    )
                days = changed_days(connection)
                assert days is not None
                refresh_sequences(connection, *days)
        store = feature_store(url)
        apply(store)
        try:
            yield url, store
        finally:
            close(store)


def _towers(url: str) -> dict[str, tuple[list[str], list[int]]]:
    """User → (items, microseconds) as training reads them."""
    with connect(url) as connection:
        catalogue, _ = read_catalogue(connection)
        histories = read_histories(connection, catalogue)
    return {
        user: (
            [catalogue.item_ids[item] for item in histories.of(row)],
            histories.times[histories.offsets[row] : histories.offsets[row + 1]].tolist(),
        )
        for row, user in enumerate(histories.user_ids)
    }


def _micros(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _before(history: tuple[list[str], list[int]], moment: datetime) -> tuple[list[str], list[int]]:
    items, times = history
    known = sum(time < _micros(moment) for time in times)
    first = max(0, known - SEQUENCE_LENGTH)
    return items[first:known], times[first:known]


def _asked(towers: dict[str, tuple[list[str], list[int]]]) -> list[tuple[str, datetime]]:
    """Sampled users at times before, at, between and after their events, and where days meet."""
    random = Random(1)
    asked = []
    for user, (_, times) in towers.items():
        near = [datetime.fromtimestamp(0, UTC) + timedelta(microseconds=each) for each in random.sample(times, 5)]
        moments = [each + timedelta(microseconds=random.choice([-1, 0, 1])) for each in near]
        days = [START + timedelta(days=number) for number in (-1, 0, 3, 4, 11)]
        asked += [(user, moment) for moment in (*moments, *days, START + timedelta(days=random.uniform(0, 10)))]
    return asked


def test_the_feature_is_what_the_towers_learn_from(log: tuple[str, Any]) -> None:
    import pandas as pd

    url, store = log
    towers = _towers(url)
    assert set(towers) == set(USERS)
    asked = _asked(towers)
    users, moments = zip(*asked, strict=True)
    times = pd.to_datetime(list(moments), utc=True).astype("datetime64[us, UTC]")
    frame = pd.DataFrame({USER_ID: users, "event_timestamp": times, "number": range(len(asked))})
    names = ["user_sequence:item_ids", "user_sequence:occurred_ats"]
    answer = store.get_historical_features(frame, names).to_df().set_index("number").sort_index()
    filled = 0
    for number, (user, moment) in enumerate(asked):
        found = answer.loc[number, ["item_ids", "occurred_ats"]]
        items, micros = ([] if each is None else list(each) for each in found)
        assert (items, micros) == _before(towers[user], moment), (user, moment)
        filled += len(items) == SEQUENCE_LENGTH
    assert filled > 2, "no sequence was full: its length would not be tested"


def test_the_fragment_is_what_the_towers_learn_from(log: tuple[str, Any]) -> None:
    """For whoever reads the log itself at a moment."""
    url, _ = log
    towers = _towers(url)
    statement = (
        b"select coalesce(array_agg(item_id order by " + ORDER.encode() + b"), '{}') from ("
        + newest_events("%(user)s", "%(moment)s").as_bytes() + b") as newest"
    )  # fmt: skip
    with connect(url) as connection:
        for user, moment in _asked(towers):
            row = connection.execute(statement, {"user": user, "moment": moment}).fetchone()
            assert row == (_before(towers[user], moment)[0],), (user, moment)


def test_the_online_feature_is_the_newest_history(log: tuple[str, Any]) -> None:
    url, store = log
    towers = _towers(url)
    names = ["user_sequence:item_ids", "user_sequence:occurred_ats"]
    answer = store.get_online_features(names, {USER_ID: [*towers]}).to_dict()
    expected = [_before(history, datetime.max.replace(tzinfo=UTC)) for history in towers.values()]
    assert list(zip(answer["item_ids"], answer["occurred_ats"], strict=True)) == expected

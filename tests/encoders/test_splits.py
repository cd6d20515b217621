"""Splits by hand, and the leak test: the future cannot reach what the model reads."""

import numpy as np
import pytest

from encoders.catalogue import Histories
from encoders.evaluation.splits import (
    Split,
    cold_items,
    cold_users,
    future,
    leave_one_out,
    production,
    refit,
    strong_generalisation,
    temporal,
)
from tests.encoders.data import ITEMS, histories_of, tiny_histories


def as_lists(histories: Histories) -> dict[str, list[int]]:
    return {user: histories.of(row).tolist() for row, user in enumerate(histories.user_ids)}


def test_leave_one_out_by_hand() -> None:
    split = leave_one_out(histories_of({"a": [1, 2, 3, 4], "b": [5, 6], "c": [7], "d": [8, 9, 1]}))
    assert as_lists(split.train) == {"a": [1, 2], "b": [5, 6], "c": [7], "d": [8]}
    assert as_lists(split.validation.histories) == {"a": [1, 2], "d": [8]}
    assert split.validation.targets.tolist() == [3, 9]
    assert as_lists(split.test.histories) == {"a": [1, 2, 3], "d": [8, 9]}
    assert split.test.targets.tolist() == [4, 1]


def test_refit_trains_on_the_validation_item_and_asks_the_same() -> None:
    histories = tiny_histories()
    strict, again = leave_one_out(histories), refit(histories)
    assert len(again.train.items) == len(strict.train.items) + len(strict.validation)
    assert again.test.targets.tolist() == strict.test.targets.tolist()
    assert as_lists(again.test.histories) == as_lists(strict.test.histories)


def test_production_learns_from_everything() -> None:
    histories = tiny_histories()
    split = production(histories)
    assert as_lists(split.train) == as_lists(histories)
    assert len(split.validation) == len(split.test) == 0


def test_temporal_by_hand() -> None:
    times = {"a": [0, 1, 8, 9], "b": [2, 3, 4, 5, 6, 7]}
    histories = histories_of({"a": [0, 1, 2, 3], "b": [4, 5, 6, 7, 8, 9]}, times)
    split = temporal(histories, test=0.2, validation=0.3)
    assert as_lists(split.train) == {"a": [0, 1], "b": [4, 5, 6]}
    assert as_lists(split.validation.histories) == {"b": [4, 5, 6]}
    assert split.validation.targets.tolist() == [7]
    assert as_lists(split.test.histories) == {"a": [0, 1]}
    assert split.test.targets.tolist() == [2]


def test_strong_generalisation_keeps_users_apart() -> None:
    histories = tiny_histories(users=60)
    split = strong_generalisation(histories, share=0.2)
    groups = [set(part.user_ids) for part in (split.train, split.validation.histories, split.test.histories)]
    assert len(split.test) == len(split.validation) == 12
    assert not groups[0] & groups[1] | groups[1] & groups[2] | groups[0] & groups[2]


def test_cold_items_are_never_trained_on() -> None:
    histories = tiny_histories(users=80)
    split = cold_items(histories, ITEMS, share=0.2)
    cold = set(split.test.targets.tolist())
    assert cold
    assert not cold & set(split.train.items.tolist())
    assert not cold & set(split.validation.targets.tolist())
    assert not cold & set(split.test.histories.items.tolist())
    assert split.test.histories.lengths.min() >= 1


def test_cold_users_are_never_trained_on_and_asked_for_their_first_event() -> None:
    histories = tiny_histories(users=60)
    split = cold_users(histories)
    own = as_lists(histories)
    cold = split.test.histories.user_ids
    assert len(cold) == 12
    assert not set(cold) & {*split.train.user_ids, *split.validation.histories.user_ids}
    assert split.test.histories.lengths.max() == 0
    assert split.test.targets.tolist() == [own[user][0] for user in cold]
    strict = leave_one_out(histories.select(np.array([u for u, user in enumerate(own) if user not in cold])))
    assert inputs_of(strict)[:3] == [as_lists(split.train), *inputs_of(split)[1:3]]


def inputs_of(split: Split) -> list[object]:
    """All that a model reads of a split before it answers the test questions, targets of validation included."""
    return [
        as_lists(split.train),
        as_lists(split.validation.histories),
        split.validation.targets.tolist(),
        as_lists(split.test.histories),
    ]


def test_shuffling_the_future_changes_no_input() -> None:
    """Leave-one-out: other test targets, the same inputs."""
    histories = tiny_histories(users=60)
    asked = histories.lengths >= 3
    items = histories.items.copy()
    last = histories.offsets[1:][asked] - 1
    items[last] = np.random.default_rng(1).permutation(items[last])
    shuffled = Histories(histories.user_ids, histories.offsets, items, histories.times)
    assert leave_one_out(shuffled).test.targets.tolist() != leave_one_out(histories).test.targets.tolist()
    assert inputs_of(leave_one_out(shuffled)) == inputs_of(leave_one_out(histories))


def test_shuffling_everything_after_the_cut_changes_no_input() -> None:
    """Temporal: all events after the test cut change places, and no input moves."""
    histories = tiny_histories(users=60)
    times = np.random.default_rng(2).permutation(len(histories.items)).astype(np.int64)
    for user in range(len(histories)):
        times[histories.offsets[user] : histories.offsets[user + 1]].sort()
    before = Histories(histories.user_ids, histories.offsets, histories.items, times)
    after = times >= np.sort(times)[int(len(times) * 0.9)]
    items = histories.items.copy()
    items[after] = np.random.default_rng(3).permutation(items[after])
    shuffled = Histories(histories.user_ids, histories.offsets, items, times)
    assert not np.array_equal(items, histories.items)
    assert inputs_of(temporal(shuffled)) == inputs_of(temporal(before))


def test_the_future_is_the_set_of_new_items_by_hand() -> None:
    histories = histories_of({"a": [0, 1, 2, 3, 4, 5, 6, 9, 0, 8], "b": [1, 2], "c": [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]})
    split = future(histories, strangers=0)
    assert as_lists(split.train) == {"a": [0, 1, 2, 3, 4, 5, 6], "b": [1, 2], "c": [3] * 7}
    assert as_lists(split.validation.histories) == {"a": [0, 1, 2, 3, 4, 5, 6]}
    assert split.validation.targets.tolist() == [9]
    assert as_lists(split.test.histories) == {"a": [0, 1, 2, 3, 4, 5, 6, 9]}  # c meets nothing new
    assert split.test.targets.tolist() == [8]
    assert split.test.sets is not None
    assert split.test.sets.tolist() == [0]


def test_strangers_are_asked_and_never_trained_on() -> None:
    histories = tiny_histories(50, longest=30)
    split = future(histories, strangers=0.2)
    strangers = set(histories.user_ids) - set(split.train.user_ids)
    assert len(strangers) == 10
    assert not strangers & set(split.validation.histories.user_ids)
    assert strangers & set(split.test.histories.user_ids)


@pytest.mark.parametrize(
    "split", [leave_one_out, refit, production, temporal, strong_generalisation, cold_users, future]
)
def test_no_users_give_no_questions(split: object) -> None:
    assert callable(split)
    assert len(split(histories_of({})).test) == 0


def test_one_user_with_one_event_is_trained_on_and_asked_nothing() -> None:
    split = leave_one_out(histories_of({"only": [3]}))
    assert as_lists(split.train) == {"only": [3]}
    assert len(split.validation) == len(split.test) == 0

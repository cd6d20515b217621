"""Packed rows hold every training pair once, and nobody reads anybody else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.training.packing import Rows, batches, pack
from tests.encoders.data import histories_of, tiny_histories


def pairs(rows: Rows) -> list[tuple[int, int]]:
    """(input, target) of every valid token."""
    valid = rows.segments > 0
    return sorted(zip(rows.inputs[valid].tolist(), rows.targets[valid].tolist(), strict=True))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(1, 9), users=st.integers(0, 20))
def test_every_pair_of_neighbours_is_trained_on_once(seed: int, width: int, users: int) -> None:
    histories = tiny_histories(users, seed=seed)
    rows = pack(histories, width, np.random.default_rng(seed))
    expected = [
        (int(one), int(two))
        for user in range(users)
        for one, two in zip(histories.of(user)[:-1], histories.of(user)[1:], strict=True)
    ]
    assert pairs(rows) == sorted(expected)


def test_positions_count_from_the_start_of_a_window_and_reading_is_causal() -> None:
    rows = pack(histories_of({"a": [1, 2, 3, 4], "b": [5, 6, 7]}), 5, np.random.default_rng(0))
    assert len(rows) == 1
    assert rows.inputs[0].tolist() == [1, 2, 3, 5, 6]
    assert rows.targets[0].tolist() == [2, 3, 4, 6, 7]
    assert rows.positions[0].tolist() == [0, 1, 2, 0, 1]
    assert rows.users == [[0, 1]]
    (batch,) = batches(rows, 4, torch.device("cpu"))
    reads = [torch.nonzero(row).squeeze(1).tolist() for row in batch.allowed[0]]
    assert reads == [[0], [0, 1], [0, 1, 2], [3], [3, 4]]


def test_rows_are_nearly_full() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.geometric(0.15, 2000) + 1
    histories = histories_of({str(user): list(range(length)) for user, length in enumerate(lengths)})
    rows = pack(histories, 50, rng)
    assert (rows.segments > 0).mean() > 0.98


@pytest.mark.parametrize("sequences", [{}, {"a": [1]}, {"a": [], "b": [2]}])
def test_nothing_to_train_on_packs_no_rows(sequences: dict[str, list[int]]) -> None:
    assert len(pack(histories_of(sequences), 5, np.random.default_rng(0))) == 0


def test_windows_of_a_long_history_move_from_epoch_to_epoch() -> None:
    histories = histories_of({"a": list(range(40))})
    starts = {
        tuple(np.flatnonzero(pack(histories, 10, np.random.default_rng(seed)).positions.ravel() == 0).tolist())
        for seed in range(5)
    }
    assert len(starts) > 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(1, 9), windows=st.lists(st.integers(1, 8), min_size=1, max_size=3))
def test_drawn_targets_lie_within_the_windows_ahead(seed: int, width: int, windows: list[int]) -> None:
    """Items are their places in the one history: what is drawn comes after the input, at most the widest window on."""
    histories = histories_of({"a": list(range(100, 125)), "b": list(range(3))})
    rows = pack(histories, width, np.random.default_rng(seed), windows=windows, drawn=4)
    assert rows.drawn is not None
    valid = rows.segments > 0
    ahead = rows.drawn[valid] - rows.inputs[valid][:, None]
    last = np.where(rows.inputs[valid] >= 100, 124, 2)
    assert (ahead >= 1).all()
    assert (ahead <= np.minimum(max(windows), last - rows.inputs[valid])[:, None]).all()
    (batch,) = batches(rows, len(rows), torch.device("cpu"))
    assert batch.drawn is not None
    assert batch.drawn.shape == (len(batch.targets), 4)
    if max(windows) == 1:
        assert (batch.drawn == batch.targets[:, None]).all()

"""Search in long histories: exact against a plain reference, in bounded memory, and taught."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encoders.towers import search
from encoders.towers.search import SearchUnit, histogram
from encoders.training.search_attention import train_search
from tests.encoders.data import ITEMS, histories_of, tiny_histories


def random_unit(seed: int = 0) -> SearchUnit:
    torch.manual_seed(seed)
    unit = SearchUnit(8, 2)
    for value in unit.parameters():
        value.data = torch.randn_like(value)
    return unit


@pytest.mark.parametrize("events", [1, 5, 40])
@pytest.mark.parametrize("block", [3, 2048])
def test_what_is_found_is_the_best_of_each_head(events: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "EVENTS_BLOCK", block)
    unit, k = random_unit(), 6
    candidates, history = F.normalize(torch.randn(4, 8), dim=1), F.normalize(torch.randn(events, 8), dim=1)
    found = unit.search(candidates, history, k)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        scores = unit.query(candidates)[:, part] @ unit.key(history)[:, part].T
        kept = min(k, events)
        assert torch.equal(found.indices[:, head, :kept], scores.argsort(dim=1, descending=True)[:, :kept])
        wanted = (scores.topk(kept).values * unit.log_sharpness.exp()).softmax(dim=1)
        assert torch.allclose(found.attention[:, head, :kept], wanted, atol=1e-6)
    assert (found.indices[:, :, events:] == -1).all()
    assert (found.attention[:, :, events:] == 0).all()


def test_a_history_without_events_says_nothing() -> None:
    found = random_unit().search(torch.randn(3, 8), torch.zeros(0, 8), 4)
    assert (found.indices == -1).all()
    assert (found.attention == 0).all()
    assert random_unit()(torch.randn(3, 8), torch.zeros(0, 8), 4).tolist() == [0, 0, 0]


def test_histogram_by_hand() -> None:
    candidate = torch.tensor([[1.0, 0.0]])
    history = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    wanted = [0.0] * 20
    wanted[19], wanted[10], wanted[0] = math.log(3), math.log(2), math.log(2)
    assert histogram(candidate, history)[0].tolist() == pytest.approx(wanted)


def test_gradients_reach_both_projections_through_what_was_found() -> None:
    for events in (30, 3):  # more than are to be found, and fewer
        unit = random_unit()
        unit(F.normalize(torch.randn(4, 8), dim=1), F.normalize(torch.randn(events, 8), dim=1), 5).sum().backward()
        for name, value in unit.named_parameters():
            assert value.grad is not None, name
            assert value.grad.isfinite().all(), name
            assert value.grad.abs().sum() > 0, name


def test_training_tells_the_next_item_better() -> None:
    """Users walk through one taste of three; an item's vector says nothing of its taste until it is taught."""
    torch.manual_seed(0)
    items, histories = F.normalize(torch.randn(ITEMS, 16), dim=1), tiny_histories(users=80, longest=12)

    def ahead(unit: SearchUnit) -> float:
        """Share of (taken, other taste) pairs in the right order."""
        right = []
        for user in range(len(histories)):
            events = histories.of(user)
            if len(events) > 3:
                pair = torch.tensor([int(events[-1]), int(events[-1] + 1) % ITEMS])
                with torch.no_grad():
                    scores = unit(items[pair], items[torch.from_numpy(events[:-1])], 5)
                right.append(bool(scores[0] > scores[1]))
        return float(np.mean(right))

    assert ahead(train_search(items, histories, heads=2, k=5, steps=200, negatives=10, learning_rate=1e-2)) > 0.8
    assert ahead(SearchUnit(16, 2)) < 0.7


def test_ten_thousand_events_and_one_user_without_a_pair() -> None:
    items = F.normalize(torch.randn(50, 16), dim=1)
    long = histories_of({"a": [step % 50 for step in range(10_000)], "b": [1]})
    unit = train_search(items, long, heads=2, k=50, steps=2, negatives=4)
    found = unit.search(items[:3], items[torch.from_numpy(long.of(0))], 50)
    assert found.indices.shape == (3, 2, 50)
    assert int(found.indices.max()) < 10_000
    assert train_search(items, histories_of({"b": [1]}), heads=2).training is False

"""Metrics equal hand-computed cases, and independent references on drawn input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from encoders.evaluation import metrics

SCORES = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.4, 0.3, 0.2]])


def test_ranks_by_hand() -> None:
    assert metrics.ranks(SCORES, torch.tensor([0, 3])).tolist() == [1, 3]


def test_hidden_items_leave_the_ranking() -> None:
    hidden = torch.tensor([[True, False, False, False], [False, True, False, False]])
    assert metrics.ranks(SCORES, torch.tensor([2, 3]), hidden).tolist() == [2, 2]


def test_a_hidden_target_is_last() -> None:
    hidden = torch.tensor([[True, False, False, False], [False, False, False, False]])
    assert metrics.ranks(SCORES, torch.tensor([0, 1]), hidden).tolist() == [4, 1]


def test_ties_count_against_the_model() -> None:
    assert metrics.ranks(torch.zeros(1, 5), torch.tensor([0])).tolist() == [5]


@pytest.mark.parametrize("target", [0, 1])
def test_a_score_that_is_no_number_never_wins(target: int) -> None:
    scores = torch.tensor([[float("nan"), 0.5, 0.1]])
    assert metrics.ranks(scores, torch.tensor([target])).tolist() == [[3], [1]][target]


def test_recall_ndcg_mrr_by_hand() -> None:
    ranks = torch.tensor([1, 3, 11])
    assert metrics.recall(ranks, 10) == pytest.approx(2 / 3)
    assert metrics.ndcg(ranks, 10) == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert metrics.mrr(ranks) == pytest.approx((1 + 1 / 3 + 1 / 11) / 3)


def test_no_questions_are_zero() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert metrics.recall(none, 10) == metrics.ndcg(none, 10) == metrics.mrr(none) == 0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), items=st.integers(2, 40), k=st.integers(1, 20))
def test_ndcg_and_recall_equal_scikit_learn_and_a_sort(seed: int, items: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.linspace(-1, 1, items), (5, 1)), axis=1)
    targets = rng.integers(items, size=5)
    relevant = np.eye(items)[targets]
    ranks = metrics.ranks(torch.from_numpy(scores), torch.from_numpy(targets))
    assert metrics.ndcg(ranks, k) == pytest.approx(ndcg_score(relevant, scores, k=k))
    first = np.argsort(-scores, axis=1)[:, :k]
    assert metrics.recall(ranks, k) == pytest.approx(np.mean([targets[q] in first[q] for q in range(5)]))


def test_coverage_by_hand() -> None:
    assert metrics.coverage(torch.tensor([[0, 1], [1, 2]]), 6) == pytest.approx(0.5)


def test_diversity_by_hand() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    assert metrics.intra_list_diversity(torch.tensor([[0, 1]]), vectors) == pytest.approx(1.0)
    assert metrics.intra_list_diversity(torch.tensor([[0, 2]]), vectors) == pytest.approx(0.0)
    assert metrics.intra_list_diversity(torch.tensor([[0, 1, 2]]), vectors) == pytest.approx(2 / 3)
    assert metrics.intra_list_diversity(torch.tensor([[0]]), vectors) == 0.0


def test_diversity_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, 4, generator=random)
    lists = torch.randint(20, (11, 5), generator=random)
    whole = metrics.intra_list_diversity(lists, vectors)
    monkeypatch.setattr(metrics, "LISTS", 3)  # three rounds and a remainder
    assert metrics.intra_list_diversity(lists, vectors) == pytest.approx(whole, abs=1e-12)


def test_interest_shares_by_hand() -> None:
    assert metrics.interest_shares(torch.tensor([[0, 0], [2, 0]]), 3) == pytest.approx([0.75, 0.0, 0.25])


def test_sets_of_targets_by_hand() -> None:
    """Question 0 finds ranks 1 and 3 of its three targets among the first 3, question 1 nothing."""
    ranks, sets = torch.tensor([3, 9, 1, 12]), torch.tensor([0, 0, 0, 1])
    assert metrics.hits(ranks, 3, sets).tolist() == pytest.approx([2 / 3, 0])
    assert metrics.hits(ranks, 1, sets).tolist() == pytest.approx([1, 0])  # one place, and it is a hit
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert metrics.gains(ranks, 3, sets).tolist() == pytest.approx([(1 + 1 / math.log2(4)) / ideal, 0])
    assert metrics.recall(ranks, 3, sets) == pytest.approx(1 / 3)
    assert metrics.mrr(ranks, sets) == pytest.approx((1 + 1 / 12) / 2)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 20))
def test_sets_of_one_target_are_questions_of_one(ranks: list[int], k: int) -> None:
    drawn, alone = torch.tensor(ranks), torch.arange(len(ranks))
    for metric in (metrics.recall, metrics.ndcg):
        assert metric(drawn, k, alone) == pytest.approx(metric(drawn, k))
    assert metrics.mrr(drawn, alone) == pytest.approx(metrics.mrr(drawn))
    empty = torch.zeros(0, dtype=torch.int64)
    assert metrics.recall(empty, k, empty) == metrics.mrr(empty, empty) == 0

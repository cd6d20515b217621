"""The harness and the baselines in it, against brute force."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from encoders.catalogue import Histories
from encoders.config import TowersConfig
from encoders.cooccurrence import following, ppmi_vectors
from encoders.evaluation import metrics
from encoders.evaluation.baselines import Frozen, ItemKnn, Popularity, TfIdf, baselines, item_tokens
from encoders.evaluation.evaluate import (
    TowersScorer,
    asked,
    best_scores,
    evaluate,
    interests_report,
    owners_of,
    padded,
    ranks_of,
    seen,
    validation_ndcg,
)
from encoders.evaluation.splits import Questions, future, leave_one_out, no_questions
from encoders.towers.model import Interests
from encoders.towers.towers import Towers
from tests.encoders.data import ITEMS, histories_of, tiny_catalogue, tiny_histories


class ByIndex:
    """Every user likes a low item index best."""

    def __call__(self, histories: Histories) -> Tensor:
        return -torch.arange(6.0).expand(len(histories), -1)


def test_evaluation_by_hand() -> None:
    questions = Questions(histories_of({"a": [0, 1], "b": [5]}), np.array([2, 3]))
    found = evaluate(ByIndex(), questions, 6, depths=(1, 2, 4), vectors_VD=torch.eye(6))
    assert found["masked"]["recall@1"] == pytest.approx(0.5)  # a's 2 is first once 0 and 1 are hidden, b's 3 is fourth
    assert found["masked"]["recall@4"] == pytest.approx(1.0)
    assert found["unmasked"]["recall@2"] == 0
    assert found["unmasked"]["recall@4"] == pytest.approx(1.0)
    assert found["unmasked"]["mrr"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert found["unmasked"]["coverage@10"] == 1.0
    assert found["unmasked"]["diversity@10"] == pytest.approx(1.0)


def test_the_size_of_a_chunk_changes_nothing() -> None:
    split = leave_one_out(tiny_histories())
    whole = evaluate(Popularity(split.train, ITEMS), split.test, ITEMS, chunk=1000)
    assert evaluate(Popularity(split.train, ITEMS), split.test, ITEMS, chunk=3) == whole
    assert validation_ndcg(Popularity(split.train, ITEMS), split.test, ITEMS)[0] == whole["masked"]["ndcg@10"]


def test_of_many_questions_the_same_few_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    split = leave_one_out(tiny_histories())
    scorer = Popularity(split.train, ITEMS)
    assert asked(split.test) is split.test
    monkeypatch.setattr("encoders.evaluation.evaluate.MOST_QUESTIONS", 7)
    few = asked(split.test)
    assert len(few) == 7 < len(split.test)
    assert asked(split.test).histories.user_ids == few.histories.user_ids
    row = {user: n for n, user in enumerate(split.test.histories.user_ids)}
    for place, user in enumerate(few.histories.user_ids):
        assert few.targets[place] == split.test.targets[row[user]]
        assert few.histories.of(place).tolist() == split.test.histories.of(row[user]).tolist()
    assert evaluate(scorer, split.test, ITEMS) == evaluate(scorer, few, ITEMS)
    assert validation_ndcg(scorer, split.validation, ITEMS) == validation_ndcg(scorer, asked(split.validation), ITEMS)


def test_nothing_asked_scores_zero() -> None:
    found = evaluate(ByIndex(), no_questions(), 6)
    assert set(found["masked"].values()) == {0.0}


def test_padding_keeps_the_newest_events_in_order() -> None:
    rows, mask = padded(histories_of({"a": [1, 2, 3, 4], "b": [5], "c": []}), 3)
    assert rows[0].tolist() == [2, 3, 4]
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert rows[1, 0] == 5


def test_seen_marks_the_history() -> None:
    assert seen(histories_of({"a": [1, 1], "b": []}), 3).tolist() == [[False, True, False], [False] * 3]


def test_the_score_is_the_best_interest_in_use() -> None:
    interests = Interests(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[1.0, 0.0]]))
    items = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert best_scores(interests, items)[0].tolist() == pytest.approx([1.0, 0.0, 0.6])
    both = interests._replace(weights=torch.tensor([[0.5, 0.5]]))
    assert best_scores(both, items)[0].tolist() == pytest.approx([1.0, 1.0, 0.8])


def test_a_soft_maximum_adds_up_what_the_interests_in_use_say() -> None:
    interests = Interests(torch.eye(3)[None], torch.tensor([[0.75, 0.25, 0.0]]))
    items = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    sums = [np.exp(1 / 0.5) + 1, np.exp(0.6 / 0.5) + np.exp(0.8 / 0.5), 2]
    assert best_scores(interests, items, 0.5)[0].tolist() == pytest.approx([0.5 * np.log(one) for one in sums])


def test_towers_score_every_user_alone_as_in_company() -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    shape = TowersConfig(dim=16, history=8, interests=3, content_width=16, modalities=catalogue.modalities)
    scorer = TowersScorer(Towers(replace(shape, shrinkage=1.0), catalogue))
    together = scorer(histories)
    for user in (0, 7, 31):
        torch.testing.assert_close(scorer(histories.select(np.array([user])))[0], together[user])


def test_the_interests_report_adds_up() -> None:
    catalogue = tiny_catalogue(content=False)
    scorer = TowersScorer(Towers(TowersConfig(dim=16, history=8, interests=3), catalogue))
    found = interests_report(scorer, leave_one_out(tiny_histories()).test)
    for name in ("candidates", "targets", "weights"):
        assert sum(found[name]) == pytest.approx(1.0)  # type: ignore[arg-type]
    assert 0 <= found["calibration_error"] <= 1  # type: ignore[operator]
    assert -0.5 <= found["cosine"] < 1  # type: ignore[operator]


def test_owners_by_hand() -> None:
    interests = Interests(torch.eye(3)[None, :, :], torch.tensor([[0.5, 0.5, 0.0]]))
    items = torch.tensor([[[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0.2, 0.0, 5.0]]])
    assert owners_of(interests, items).tolist() == [[1, 0, 0]]


def test_popularity_by_hand() -> None:
    train = histories_of({"a": [2, 2, 1], "b": [2]})
    assert Popularity(train, 4)(train).tolist() == [[0, 1, 3, 0], [0, 1, 3, 0]]


def knn_by_loops(train: Histories, items: int, history: list[int]) -> np.ndarray:
    """The definition in the docstring of ItemKnn, word by word."""
    similar, counts = np.zeros((items, items)), np.zeros(items)
    for user in range(len(train)):
        events = train.of(user).tolist()
        for place, one in enumerate(events):
            counts[one] += 1
            for gap in range(1, min(50, len(events) - 1 - place) + 1):
                two = events[place + gap]
                similar[one, two] += 1 / gap
                similar[two, one] += 0.5 / gap
    similar /= np.sqrt(np.outer(np.maximum(counts, 1), np.maximum(counts, 1)))
    scores = np.zeros(items)
    for back, item in enumerate(reversed(history[-10:])):
        scores += 0.8**back * similar[item]
    return scores


def test_item_knn_equals_its_definition() -> None:
    train = tiny_histories(users=25, longest=70)
    found = ItemKnn(train, ITEMS)(train)
    for user in range(25):
        expected = knn_by_loops(train, ITEMS, train.of(user).tolist())
        np.testing.assert_allclose(found[user].numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["popularity", "item_knn", "tf_idf", "knn_tf_idf", "frozen"])
@pytest.mark.parametrize("sequences", [{}, {"a": [1]}])
def test_baselines_bear_little_data(name: str, sequences: dict[str, list[int]]) -> None:
    histories = histories_of(sequences)
    documents = [[f"word{item % 3}"] if item else [] for item in range(ITEMS)]
    asked = leave_one_out(tiny_histories()).validation
    scores = baselines(histories, ITEMS, documents, asked, tiny_catalogue())[name](histories)
    assert scores.shape == (len(sequences), ITEMS)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_a_set_is_ranked_as_its_targets_one_by_one(chunk: int | None) -> None:
    split = future(tiny_histories(60, longest=25))
    scorer = Popularity(split.train, ITEMS)
    found = ranks_of(scorer, split.test, ITEMS, chunk=chunk)
    assert split.test.sets is not None
    alone = Questions(split.test.histories.select(split.test.sets), split.test.targets)
    torch.testing.assert_close(found, ranks_of(scorer, alone, ITEMS))
    order = np.random.default_rng(0).permutation(len(split.test))
    moved, places = split.test.select(order)
    torch.testing.assert_close(ranks_of(scorer, moved, ITEMS), found[torch.from_numpy(places)])
    report = evaluate(scorer, split.test, ITEMS)["masked"]
    one = int(np.flatnonzero(np.bincount(split.test.sets) > 1)[0])
    mine = found[torch.from_numpy(split.test.sets == one)]
    by_set = metrics.hits(found, 5, torch.from_numpy(split.test.sets))
    assert by_set[one] == pytest.approx(int((mine <= 5).sum()) / min(5, len(mine)))
    assert report["recall@5"] == pytest.approx(float(by_set.mean()))


def test_tf_idf_by_hand() -> None:
    documents = [["red", "dress"], ["red", "shoe"], ["blue", "shoe"], []]
    weights = {name: np.log(5 / (1 + seen)) + 1 for name, seen in (("red", 2), ("dress", 1), ("shoe", 2), ("blue", 1))}
    vectors = np.array([[weights[name] * (name in tokens) for name in weights] for tokens in documents])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found = TfIdf(documents)(histories_of({"a": [0, 2], "b": [3]}))
    np.testing.assert_allclose(found[0].numpy(), (0.8 * vectors[0] + vectors[2]) @ vectors.T, rtol=1e-5, atol=1e-7)
    assert not found[1].any()
    tokens = item_tokens("A Red dress", None, {"colour": "Red", "sizes": ["S", None], "year": 1999, "none": ""})
    assert tokens == ["a", "red", "dress", "colour=red", "sizes=s", "year=1999"]


def test_frozen_content_finds_the_taste_and_nothing_by_an_item_without_any() -> None:
    catalogue = tiny_catalogue()
    there = catalogue.present["text"] & catalogue.present["attributes"]
    item = int(np.flatnonzero(there)[4])
    scores = Frozen(catalogue, rank=2)(histories_of({"a": [item], "b": [ITEMS - 1]}))
    best = [other for other in scores[0].argsort(descending=True).tolist() if there[other]][:4]
    assert {other % 3 for other in best} == {item % 3}
    assert not scores[1].any()


def test_following_by_hand() -> None:
    found = following(histories_of({"a": [0, 1, 2], "b": [1, 2]}), 3, window=2).toarray()
    assert found.tolist() == [[0, 1, 0.5], [0, 0, 2], [0, 0, 0]]


def test_ppmi_vectors_bring_items_of_one_taste_together() -> None:
    vectors = ppmi_vectors(tiny_histories(users=200), ITEMS, 16, seed=0)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines, same = unit @ unit.T, np.equal.outer(np.arange(ITEMS) % 3, np.arange(ITEMS) % 3)
    off = ~np.eye(ITEMS, dtype=bool)
    assert cosines[same & off].mean() > cosines[~same].mean() + 0.1
    assert np.linalg.norm(vectors, axis=1).mean() == pytest.approx(0.02 * 16**0.5, rel=0.5)


def test_ppmi_vectors_of_nothing_are_noise() -> None:
    assert np.isfinite(ppmi_vectors(histories_of({}), ITEMS, 16, seed=0)).all()


MEMORY = """
import resource
import numpy as np
from encoders.evaluation.baselines import Popularity
from encoders.catalogue import Histories
from encoders.evaluation.evaluate import evaluate, validation_ndcg
from encoders.evaluation.splits import leave_one_out

random, users, items = np.random.default_rng(0), 20_000, 2_000
offsets = np.arange(users + 1) * 3
events = random.integers(items, size=3 * users)
split = leave_one_out(Histories([str(n) for n in range(users)], offsets, events, np.arange(3 * users)))
for ask in (validation_ndcg, evaluate):
    scorer = Popularity(split.train, items)
    few = leave_one_out(Histories([str(n) for n in range(600)], offsets[:601], events[:1800], np.arange(1800)))
    ask(scorer, few.test, items)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ask(scorer, split.test, items)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_questions() -> None:
    """A few chunks and many: what is kept of a chunk must not stand in the way of the next one's scores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, env=environment
    ).stdout.split()
    assert max(map(int, found)) < 60, f"MiB more for 20,000 questions than for 600: {found}"

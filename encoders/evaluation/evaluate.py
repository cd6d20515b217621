"""Offline evaluation: exact full ranking over the catalogue, in chunks, with and without the seen items.

Legend: Q questions of a chunk, V items, D width, K interests, L list length.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from encoders.catalogue import BoolArray, Histories, IntArray
from encoders.config import TowersConfig
from encoders.evaluation import metrics
from encoders.evaluation.splits import Questions
from encoders.towers.towers import Context, Interests, Towers

Metrics = dict[str, float]
DEPTHS = (5, 10, 20, 50, 100, 500)
# Questions that are asked at most: each ranks the whole catalogue, so that all of them would cost users times items.
# The standard error of a share is at most .0022 then.
MOST_QUESTIONS = 50_000
_CHUNK = 256  # questions ranked at a time, and fewer where the catalogue is large
_LIST = 10  # length of the lists that coverage and diversity look at


class Scorer(Protocol):
    """Anything that ranks: histories of a few users -> a score for every item, higher is better, float [Q, V]."""

    def __call__(self, histories: Histories) -> Tensor: ...


class TowersScorer:
    """max over a user's interests of the inner product with the item embedding: what the index answers, exactly.

    softness: of the maximum, see `best_scores`; `TrainConfig.softness` makes it what the towers were trained with.
    """

    def __init__(self, towers: Towers, *, softness: float = 0.0) -> None:
        self.towers, self.softness = towers, softness
        self.items_VD = towers.item_embeddings().item

    def __call__(self, histories: Histories) -> Tensor:
        found = self.interests(histories)
        return best_scores(found, self.items_VD, self.softness)

    def interests(self, histories: Histories) -> Interests:
        """Interests [Q, K, D] and weights [Q, K] of these users."""
        rows_QT, mask_QT = padded(histories, self.towers.config.history)
        rows_QT, mask_QT = rows_QT.to(self.towers.device), mask_QT.to(self.towers.device)
        context = context_of(histories, self.towers.config).to(self.towers.device)
        return self.towers.user_interests(F.embedding(rows_QT, self.items_VD), mask_QT, context)


def best_scores(interests: Interests, items_VD: Tensor, softness: float = 0.0) -> Tensor:
    """max over the interests in use of v_k·e_i, or with a softness s: s · log Σ_k exp(v_k·e_i / s), [Q, V]."""
    closed_QK = interests.weights == 0
    some = closed_QK.any(dim=0).tolist()  # a mask costs as much as the scores: only where one is needed
    best = None
    for k, masked in enumerate(some):
        scores = interests.vectors[:, k] @ items_VD.T
        if softness:
            scores /= softness
        if masked:
            scores.masked_fill_(closed_QK[:, k, None], float("-inf"))
        if best is None:
            best = scores
        else:
            (torch.logaddexp if softness else torch.maximum)(best, scores, out=best)
    assert best is not None
    return best * softness if softness else best


def evaluate(
    scorer: Scorer,
    questions: Questions,
    items: int,
    *,
    depths: Sequence[int] = DEPTHS,
    vectors_VD: Tensor | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> dict[str, Metrics]:
    """{"masked": metrics, "unmasked": metrics}: recall@d and ndcg@d for each depth, mrr, coverage@10, diversity@10.

    Masked leaves out the items of the question's own history. Diversity needs vectors_VD (any item vectors); without
    them it is left out. Ties count against the model. `items`: size of the catalogue. Of more than MOST_QUESTIONS
    questions, those of `asked` are asked.
    """
    size, length = min(len(questions), MOST_QUESTIONS), min(_LIST, items)
    ranks = {name: torch.empty(size, dtype=torch.int64) for name in ("masked", "unmasked")}
    lists = {name: torch.empty(size, length, dtype=torch.int64) for name in ranks}
    chunks = list(_chunks(questions, chunk or _chunk(items)))
    for place, part, targets_Q in tqdm(chunks, desc="evaluate", disable=None if progress else True):
        scores_QV = scorer(part)
        hidden_QV = seen(part, items).to(scores_QV.device)
        targets_Q = targets_Q.to(scores_QV.device)
        ranks["unmasked"][place] = metrics.ranks(scores_QV, targets_Q).cpu()
        ranks["masked"][place] = metrics.ranks(scores_QV, targets_Q, hidden_QV).cpu()
        lists["unmasked"][place] = scores_QV.topk(length, dim=1).indices.cpu()
        shown_QV = scores_QV.masked_fill(hidden_QV, float("-inf"))
        lists["masked"][place] = shown_QV.topk(length, dim=1).indices.cpu()
    return {name: _summary(ranks[name], lists[name], items, depths, vectors_VD) for name in ranks}


def validation_ndcg(
    scorer: Scorer, questions: Questions, items: int, *, chunk: int | None = None
) -> tuple[float, float]:
    """(NDCG@10, Recall@50), seen items masked: the cheap part of `evaluate`, of the same questions."""
    ranks_Q = torch.empty(min(len(questions), MOST_QUESTIONS), dtype=torch.int64)
    for place, part, targets_Q in _chunks(questions, chunk or _chunk(items)):
        scores_QV = scorer(part)
        hidden_QV = seen(part, items).to(scores_QV.device)
        ranks_Q[place] = metrics.ranks(scores_QV, targets_Q.to(scores_QV.device), hidden_QV).cpu()
    return metrics.ndcg(ranks_Q, 10), metrics.recall(ranks_Q, 50)


def interests_report(
    scorer: TowersScorer, questions: Questions, *, chunk: int | None = None
) -> dict[str, list[float] | float]:
    """How the interests divide the work, K numbers each, seen items masked.

    candidates: share of the first 10 that each interest brought; targets: share of the true next items that belong to
    it (best score); weights: its mean weight, which should equal `targets` (calibration_error: half the sum of the
    differences, 0 to 1). cosine: mean cosine between two interests of a user, 1 for interests that do not differ.
    """
    interests, items = scorer.towers.config.interests, len(scorer.items_VD)
    size, length = min(len(questions), MOST_QUESTIONS), min(_LIST, items)
    if not size:
        return {}
    owners, own = torch.empty(size, length, dtype=torch.int64), torch.empty(size, 1, dtype=torch.int64)
    weights, cosines = torch.empty(size, interests), torch.empty(size)
    for place, part, targets_Q in _chunks(questions, chunk or _CHUNK):
        found = scorer.interests(part)
        scores_QV = best_scores(found, scorer.items_VD, scorer.softness)
        shown_QV = scores_QV.masked_fill(seen(part, items).to(scores_QV.device), float("-inf"))
        lists_QL = shown_QV.topk(length, dim=1).indices
        owners[place] = owners_of(found, scorer.items_VD[lists_QL]).cpu()
        own[place] = owners_of(found, scorer.items_VD[targets_Q][:, None]).cpu()
        weights[place] = found.weights.cpu()
        cosines[place] = _pair_cosines(found.vectors).cpu()
    shares = metrics.interest_shares(own, interests)
    mean = weights.mean(dim=0).tolist()
    return {
        "candidates": metrics.interest_shares(owners, interests),
        "targets": shares,
        "weights": mean,
        "calibration_error": sum(abs(one - two) for one, two in zip(shares, mean, strict=True)) / 2,
        "cosine": float(cosines.mean()),
    }


def owners_of(interests: Interests, items_QLD: Tensor) -> Tensor:
    """Which interest in use scores each item best, int64 [Q, L]."""
    scores_QKL = interests.vectors @ items_QLD.transpose(1, 2)
    return scores_QKL.masked_fill(interests.weights[..., None] == 0, float("-inf")).argmax(dim=1)


def _pair_cosines(vectors_QKD: Tensor) -> Tensor:
    """Mean cosine over the pairs of each user's interests, [Q]; 1 for one interest."""
    interests = vectors_QKD.shape[1]
    if interests == 1:
        return torch.ones(len(vectors_QKD))
    total_Q = vectors_QKD.sum(dim=1).square().sum(dim=1)
    return (total_Q - interests) / (interests * (interests - 1))


def padded(histories: Histories, width: int) -> tuple[Tensor, Tensor]:
    """Newest `width` events of each user, oldest first, padded on the right: int64 [Q, T] and bool [Q, T], T >= 1."""
    source, mask = _newest_events(histories, width)
    return _filled(histories.items, source, mask), torch.from_numpy(mask)


def context_of(histories: Histories, config: TowersConfig) -> Context:
    """What towers of this configuration read beside the items of `padded`."""
    times_QT = attributes_Q1A = None
    if "times" in config.reads:
        times_QT = _filled(histories.times, *_newest_events(histories, config.history))
    if "attributes" in config.reads and histories.attributes is not None:
        attributes_Q1A = torch.from_numpy(histories.attributes)[:, None]
    return Context(times_QT, attributes_Q1A)


def _newest_events(histories: Histories, width: int) -> tuple[IntArray, BoolArray]:
    lengths = np.minimum(histories.lengths, width)
    steps = np.arange(max(1, int(lengths.max(initial=1))))
    mask = steps < lengths[:, None]
    return np.where(mask, (histories.offsets[1:] - lengths)[:, None] + steps, 0), mask


def _filled(values: IntArray, source: IntArray, mask: BoolArray) -> Tensor:
    return torch.from_numpy(np.where(mask, values[source], 0) if len(values) else np.zeros(mask.shape, dtype=np.int64))


def seen(histories: Histories, items: int) -> Tensor:
    """Which items are in each history: bool [Q, V]."""
    hidden = torch.zeros(len(histories), items, dtype=torch.bool)
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    hidden[torch.from_numpy(owner), torch.from_numpy(histories.items)] = True
    return hidden


def _chunk(items: int) -> int:
    """Questions at a time: their scores stay below 64 million numbers (256 MB)."""
    return max(1, min(_CHUNK, (64 << 20) // max(items, 1)))


def asked(questions: Questions) -> Questions:
    """The questions themselves, or MOST_QUESTIONS of them, drawn alike every time."""
    if len(questions) <= MOST_QUESTIONS:
        return questions
    chosen = np.sort(np.random.default_rng(0).choice(len(questions), MOST_QUESTIONS, replace=False))
    return Questions(questions.histories.select(chosen), questions.targets[chosen])


def _chunks(questions: Questions, size: int) -> Iterator[tuple[slice, Histories, Tensor]]:
    """The questions asked, those of similar history length together, so that little is padded; and their place.

    What is kept of a chunk goes to its place in one tensor. Kept as small tensors of their own, results took room among
    the freed scores, and each chunk's scores then found none: 6 GB for 50,000 questions over 20,000 items.
    """
    questions = asked(questions)
    order = np.argsort(questions.histories.lengths, kind="stable")
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        place = slice(start, start + len(chosen))
        yield place, questions.histories.select(chosen), torch.from_numpy(questions.targets[chosen])


def _summary(
    ranks_Q: Tensor, lists_QL: Tensor, items: int, depths: Sequence[int], vectors_VD: Tensor | None
) -> Metrics:
    found = {f"recall@{depth}": metrics.recall(ranks_Q, depth) for depth in depths}
    found |= {f"ndcg@{depth}": metrics.ndcg(ranks_Q, depth) for depth in depths}
    found |= {"mrr": metrics.mrr(ranks_Q), f"coverage@{_LIST}": metrics.coverage(lists_QL, items)}
    if vectors_VD is not None:
        found[f"diversity@{_LIST}"] = metrics.intra_list_diversity(lists_QL, vectors_VD)
    return found

"""Offline evaluation: exact full ranking over the catalogue, in chunks, with and without the seen items.

Legend: Q questions of a chunk, V items, D width, K interests, L list length.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from encoders.catalogue import BoolArray, Histories, IntArray
from encoders.config import TowersConfig
from encoders.evaluation import metrics
from encoders.evaluation.splits import Questions
from encoders.towers.model import Context, Interests, Model

Metrics = dict[str, float]
TRACKS = ("masked", "unmasked")
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
    candidates_VD: what is ranked, the items unless it is set; histories are always read as items.
    """

    def __init__(self, towers: Model, *, softness: float = 0.0) -> None:
        self.towers, self.softness = towers, softness
        self.items_VD = self.candidates_VD = towers.item_embeddings().item

    def __call__(self, histories: Histories) -> Tensor:
        found = self.interests(histories)
        return best_scores(found, self.candidates_VD, self.softness)

    def interests(self, histories: Histories) -> Interests:
        """Interests [Q, K, D] and weights [Q, K] of these users."""
        rows_QT, mask_QT = padded(histories, self.towers.config.history)
        rows_QT, mask_QT = rows_QT.to(self.towers.device), mask_QT.to(self.towers.device)
        context = context_of(histories, self.towers.config).to(self.towers.device)
        return self.towers.user_interests(self.towers.events(rows_QT, self.items_VD), mask_QT, context)


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


@dataclass(frozen=True, eq=False)
class Ranked:
    """What a scorer answered, by track ("masked": without the items of the question's own history, "unmasked").

    ranks: int64 [N], of the targets, ties against the model; lists: int64 [Q, L], the first 10 items; sets: int64 [N],
    the question of each target, None for one each.
    """

    ranks: Mapping[str, Tensor]
    lists: Mapping[str, Tensor]
    sets: Tensor | None


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
    ranked = rank(scorer, questions, items, chunk=chunk, progress=progress)
    return summary(ranked, items, depths=depths, vectors_VD=vectors_VD)


def rank(
    scorer: Scorer, questions: Questions, items: int, *, chunk: int | None = None, progress: bool = False
) -> Ranked:
    """Full ranking of every question that is `asked`, in their order.

    What is kept of a chunk goes to its place in one tensor. Kept as small tensors of their own, results took room among
    the freed scores, and each chunk's scores then found none: 6 GB for 50,000 questions over 20,000 items.
    """
    questions = asked(questions)
    size, length = len(questions), min(_LIST, items)
    ranks = {name: torch.zeros(len(questions.targets), dtype=torch.int64) for name in TRACKS}
    lists = {name: torch.zeros(size, length, dtype=torch.int64) for name in TRACKS}
    chunks = list(_chunks(questions, items, chunk))
    for chosen, places, part in tqdm(chunks, desc="evaluate", disable=None if progress else True):
        scores_QV = scorer(part.histories)
        hidden_QV = seen(part.histories, items).to(scores_QV.device)
        ranks["unmasked"][places] = _ranks(scores_QV, part, None)
        ranks["masked"][places] = _ranks(scores_QV, part, hidden_QV)
        lists["unmasked"][chosen] = scores_QV.topk(length, dim=1).indices.cpu()
        lists["masked"][chosen] = scores_QV.masked_fill(hidden_QV, float("-inf")).topk(length, dim=1).indices.cpu()
    return Ranked(ranks, lists, _sets(questions))


def summary(
    ranked: Ranked, items: int, *, depths: Sequence[int] = DEPTHS, vectors_VD: Tensor | None = None
) -> dict[str, Metrics]:
    """The metrics of `evaluate`, by track."""
    return {name: _summary(ranked, name, items, depths, vectors_VD) for name in TRACKS}


def validation_ndcg(
    scorer: Scorer, questions: Questions, items: int, *, chunk: int | None = None
) -> tuple[float, float]:
    """(NDCG@10, Recall@50), seen items masked: the cheap part of `evaluate`, of the same questions."""
    questions = asked(questions)
    ranks_N, sets_N = ranks_of(scorer, questions, items, chunk=chunk), _sets(questions)
    return metrics.ndcg(ranks_N, 10, sets_N), metrics.recall(ranks_N, 50, sets_N)


def ranks_of(scorer: Scorer, questions: Questions, items: int, *, chunk: int | None = None) -> Tensor:
    """The rank of each target, seen items masked: int64 [N], in the order of the questions."""
    found = torch.zeros(len(questions.targets), dtype=torch.int64)
    for _, places, part in _chunks(questions, items, chunk):
        scores_QV = scorer(part.histories)
        found[places] = _ranks(scores_QV, part, seen(part.histories, items).to(scores_QV.device))
    return found


def interests_report(
    scorer: TowersScorer, questions: Questions, *, chunk: int | None = None
) -> dict[str, list[float] | float]:
    """How the interests divide the work, K numbers each, seen items masked.

    candidates: share of the first 10 that each interest brought; targets: share of the true next items that belong to
    it (best score); weights: its mean weight, which should equal `targets` (calibration_error: half the sum of the
    differences, 0 to 1). cosine: mean cosine between two interests of a user, 1 for interests that do not differ.
    """
    interests, items = scorer.towers.config.interests, len(scorer.items_VD)
    questions = asked(questions)
    size, length = len(questions), min(_LIST, items)
    if not size:
        return {}
    owners = torch.empty(size, length, dtype=torch.int64)
    own = torch.empty(len(questions.targets), 1, dtype=torch.int64)
    weights, cosines = torch.empty(size, interests), torch.empty(size)
    for chosen, places, part in _chunks(questions, items, chunk):
        found = scorer.interests(part.histories)
        scores_QV = best_scores(found, scorer.items_VD, scorer.softness)
        shown_QV = scores_QV.masked_fill(seen(part.histories, items).to(scores_QV.device), float("-inf"))
        lists_QL = shown_QV.topk(length, dim=1).indices
        owners[chosen] = owners_of(found, scorer.items_VD[lists_QL]).cpu()
        rows_N = torch.from_numpy(np.arange(len(part)) if part.sets is None else part.sets)
        wanted = Interests(found.vectors[rows_N], found.weights[rows_N])
        own[places] = owners_of(wanted, scorer.items_VD[torch.from_numpy(part.targets)][:, None]).cpu()
        weights[chosen] = found.weights.cpu()
        cosines[chosen] = _pair_cosines(found.vectors).cpu()
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
    queries_QTW = asked_Q1W = None
    if config.query_dim and histories.query_vectors is not None:
        vectors = np.pad(histories.query_vectors, ((0, 1), (0, 0)))  # the row of -1 is zero
        if histories.queries is not None and len(histories.queries):
            source, mask = _newest_events(histories, config.history)
            queries_QTW = torch.from_numpy(vectors[np.where(mask, histories.queries[source], -1)])
        if histories.asked is not None:
            asked_Q1W = torch.from_numpy(vectors[histories.asked])[:, None]
    return Context(times_QT, attributes_Q1A, queries_QTW, asked_Q1W)


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
    return questions.select(np.sort(np.random.default_rng(0).choice(len(questions), MOST_QUESTIONS, replace=False)))[0]


def _chunks(questions: Questions, items: int, size: int | None = None) -> Iterator[tuple[Tensor, Tensor, Questions]]:
    """(which questions, the places of their targets, both): those of similar length together: little is padded."""
    size = size or max(1, _chunk(items) * len(questions) // max(len(questions.targets), 1))
    order = np.argsort(questions.histories.lengths, kind="stable")
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        part, places = questions.select(chosen)
        yield torch.from_numpy(chosen), torch.from_numpy(places), part


def _ranks(scores_QV: Tensor, questions: Questions, hidden_QV: Tensor | None) -> Tensor:
    targets_N = torch.from_numpy(questions.targets).to(scores_QV.device)
    if questions.sets is not None:
        rows_N = torch.from_numpy(questions.sets).to(scores_QV.device)
        scores_QV, hidden_QV = scores_QV[rows_N], None if hidden_QV is None else hidden_QV[rows_N]
    return metrics.ranks(scores_QV, targets_N, hidden_QV).cpu()


def _sets(questions: Questions) -> Tensor | None:
    return None if questions.sets is None else torch.from_numpy(questions.sets)


def _summary(ranked: Ranked, track: str, items: int, depths: Sequence[int], vectors_VD: Tensor | None) -> Metrics:
    ranks_N, lists_QL, sets_N = ranked.ranks[track], ranked.lists[track], ranked.sets
    found = {f"recall@{depth}": metrics.recall(ranks_N, depth, sets_N) for depth in depths}
    found |= {f"ndcg@{depth}": metrics.ndcg(ranks_N, depth, sets_N) for depth in depths}
    found |= {"mrr": metrics.mrr(ranks_N, sets_N), f"coverage@{_LIST}": metrics.coverage(lists_QL, items)}
    if vectors_VD is not None:
        found[f"diversity@{_LIST}"] = metrics.intra_list_diversity(lists_QL, vectors_VD.cpu())
    return found

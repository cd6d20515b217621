"""Two models on the same questions: paired differences with their standard errors; and one model by segment.

Legend: S seeds, Q questions, N targets.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from encoders.catalogue import Histories
from encoders.evaluation import metrics
from encoders.evaluation.splits import Questions

# what a question contributes to each metric
GAINS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "recall@10": lambda ranks, sets: metrics.hits(ranks, 10, sets),
    "recall@50": lambda ranks, sets: metrics.hits(ranks, 50, sets),
    "recall@100": lambda ranks, sets: metrics.hits(ranks, 100, sets),
    "ndcg@10": lambda ranks, sets: metrics.gains(ranks, 10, sets),
}
# lower bounds of the segments
EVENTS, LENGTHS = (0, 1, 2, 5, 20, 100), (0, 3, 5, 10, 50)


def differences(ours_SN: Tensor, theirs_SN: Tensor, sets_N: Tensor | None = None) -> dict[str, dict[str, float]]:
    """By metric, {"mean": ours − theirs, "error": its standard error}; ranks of targets, as many seeds as there are.

    sets_N: the question of each target, None for one each.

    A question's difference is that of its means over the seeds; the error is that of the mean over the questions, so
    it holds for these questions' kind and, of the training's chance, for what differs from question to question.
    """
    found = {}
    for name, gain in GAINS.items():
        ours_SQ, theirs_SQ = (torch.stack([gain(row, sets_N) for row in ranks]) for ranks in (ours_SN, theirs_SN))
        apart_Q = ours_SQ.mean(dim=0) - theirs_SQ.mean(dim=0)
        error = float(apart_Q.std()) / math.sqrt(len(apart_Q)) if len(apart_Q) > 1 else 0.0
        found[name] = {"mean": float(apart_Q.mean()) if len(apart_Q) else 0.0, "error": error}
    return found


def segments(ranks_SN: Tensor, questions: Questions, train: Histories, items: int) -> dict[str, dict[str, object]]:
    """Metrics by training events of the target and by length of the history, seen items masked, target by target.

    {"target_events": {"0": {"targets": n, "recall@10": …}, "1": …, "2-4": …}, "history": …}; empty ones are left out.
    """
    lengths = questions.histories.lengths
    by = {
        "target_events": (EVENTS, train.counts(items)[questions.targets]),
        "history": (LENGTHS, lengths if questions.sets is None else lengths[questions.sets]),
    }
    return {name: _by_bounds(ranks_SN, bounds, values) for name, (bounds, values) in by.items()}


def _by_bounds(ranks_SN: Tensor, bounds: tuple[int, ...], values: np.ndarray) -> dict[str, object]:
    found: dict[str, object] = {}
    for low, high in zip(bounds, (*bounds[1:], None), strict=True):
        inside = (values >= low) & (values < high if high is not None else True)
        if inside.any():
            part = ranks_SN[:, torch.from_numpy(inside)].flatten()
            name = f"{low}+" if high is None else str(low) if high == low + 1 else f"{low}-{high - 1}"
            found[name] = {"targets": int(inside.sum())} | {
                "recall@10": metrics.recall(part, 10),
                "recall@50": metrics.recall(part, 50),
                "ndcg@10": metrics.ndcg(part, 10),
            }
    return found

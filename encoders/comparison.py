"""Two models on the same questions: paired differences with their standard errors; and one model by segment.

Legend: S seeds, Q questions.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from encoders import metrics
from encoders.catalogue import Histories
from encoders.splits import Questions

Gain = Callable[[Tensor], Tensor]


def _hit(depth: int) -> Gain:
    return lambda ranks: (ranks <= depth).double()


def _discounted(depth: int) -> Gain:
    return lambda ranks: torch.where(ranks <= depth, 1.0 / torch.log2(1.0 + ranks.double()), 0.0)


# what a question contributes to each metric
GAINS: dict[str, Gain] = {
    "recall@10": _hit(10),
    "recall@50": _hit(50),
    "recall@100": _hit(100),
    "ndcg@10": _discounted(10),
}
# lower bounds of the segments
EVENTS, LENGTHS = (0, 1, 2, 5, 20, 100), (0, 3, 5, 10, 50)


def differences(ours_SQ: Tensor, theirs_SQ: Tensor) -> dict[str, dict[str, float]]:
    """By metric, {"mean": ours − theirs, "error": its standard error}; ranks of targets, as many seeds as there are.

    A question's difference is that of its means over the seeds; the error is that of the mean over the questions, so
    it holds for these questions' kind and, of the training's chance, for what differs from question to question.
    """
    found = {}
    for name, gain in GAINS.items():
        apart_Q = gain(ours_SQ).mean(dim=0) - gain(theirs_SQ).mean(dim=0)
        error = float(apart_Q.std()) / math.sqrt(len(apart_Q)) if len(apart_Q) > 1 else 0.0
        found[name] = {"mean": float(apart_Q.mean()) if len(apart_Q) else 0.0, "error": error}
    return found


def segments(ranks_SQ: Tensor, questions: Questions, train: Histories, items: int) -> dict[str, dict[str, object]]:
    """Metrics by training events of the target and by length of the history, seen items masked.

    {"target_events": {"0": {"questions": n, "recall@10": …}, "1": …, "2-4": …}, "history": …}; empty ones are left out.
    """
    by = {
        "target_events": (EVENTS, train.counts(items)[questions.targets]),
        "history": (LENGTHS, questions.histories.lengths),
    }
    return {name: _by_bounds(ranks_SQ, bounds, values) for name, (bounds, values) in by.items()}


def _by_bounds(ranks_SQ: Tensor, bounds: tuple[int, ...], values: np.ndarray) -> dict[str, object]:
    found: dict[str, object] = {}
    for low, high in zip(bounds, (*bounds[1:], None), strict=True):
        inside = (values >= low) & (values < high if high is not None else True)
        if inside.any():
            part = ranks_SQ[:, torch.from_numpy(inside)].flatten()
            name = f"{low}+" if high is None else str(low) if high == low + 1 else f"{low}-{high - 1}"
            found[name] = {"questions": int(inside.sum())} | {
                "recall@10": metrics.recall(part, 10),
                "recall@50": metrics.recall(part, 50),
                "ndcg@10": metrics.ndcg(part, 10),
            }
    return found

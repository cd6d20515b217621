"""Teaches a search unit (`towers.search`) which events of a history speak for a candidate: the next item is to be told
from sampled ones, softmax of the cosines / τ. The item embeddings stay as they are.

Legend: V items, D width, N negatives.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.catalogue import Histories
from encoders.towers.search import SearchUnit
from encoders.training.train import seeded

_USERS = 32  # questions of a step
_TEMPERATURE = 0.1


def train_search(
    items_VD: Tensor,
    train: Histories,
    *,
    heads: int = 4,
    k: int = 50,
    steps: int = 300,
    negatives: int = 100,
    history: int = 10_000,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> SearchUnit:
    """A search unit for these item embeddings (unit rows), from the training part of a split; in evaluation mode.

    A step takes users at random, and of each one event with the (at most `history`) events before it.
    """
    able = np.flatnonzero(train.lengths >= 2)
    unit = SearchUnit(items_VD.shape[1], heads)
    optimiser = torch.optim.Adam(unit.parameters(), learning_rate)
    with seeded(seed, 0) as rng:
        for _ in range(steps if len(able) else 0):
            losses = _losses(unit, items_VD, train, rng.choice(able, _USERS).tolist(), rng, (k, negatives, history))
            optimiser.zero_grad()
            torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return unit.eval()


def _losses(
    unit: SearchUnit,
    items_VD: Tensor,
    train: Histories,
    users: Sequence[int],
    rng: np.random.Generator,
    sizes: tuple[int, int, int],
) -> list[Tensor]:
    k, negatives, history = sizes
    found = []
    for user in users:
        events = train.of(user)
        cut = int(rng.integers(1, len(events)))
        others = rng.integers(len(items_VD), size=negatives)
        candidates = torch.from_numpy(np.concatenate([events[cut : cut + 1], others[others != events[cut]]]))
        past = torch.from_numpy(events[max(0, cut - history) : cut])
        scores = unit(items_VD[candidates], items_VD[past], k) / _TEMPERATURE
        found.append(F.cross_entropy(scores[None], torch.zeros(1, dtype=torch.int64)))
    return found

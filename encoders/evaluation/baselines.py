"""Baselines as scorers of the same harness: popularity and sequential item-kNN.

*A model that does not beat the kNN is not worth shipping.* Neither may be weakened.
"""

import numpy as np
import scipy.sparse as sparse
import torch
from torch import Tensor

from encoders.catalogue import Histories
from encoders.cooccurrence import following
from encoders.evaluation.evaluate import Scorer


class Popularity:
    """Every user gets the items with the most training events."""

    def __init__(self, train: Histories, items: int) -> None:
        self.counts = torch.from_numpy(train.counts(items)).float()

    def __call__(self, histories: Histories) -> Tensor:
        return self.counts.expand(len(histories), -1)


class ItemKnn:
    """Sequential item-kNN: what followed the user's last 10 items in other histories.

    Co-occurrence 1/gap within `window` events forward, half of it backward, cosine-normalised by the items' counts;
    the k-th last item weighs .8^k.
    """

    def __init__(self, train: Histories, items: int, *, window: int = 50, last: int = 10, decay: float = 0.8) -> None:
        ahead = following(train, items, window)
        root = np.sqrt(np.maximum(train.counts(items), 1))
        scale = sparse.diags(1.0 / root)
        self.similar = (scale @ (ahead + 0.5 * ahead.T) @ scale).tocsr()
        self.last, self.decay = last, decay

    def __call__(self, histories: Histories) -> Tensor:
        ends, lengths = histories.offsets[1:], np.minimum(histories.lengths, self.last)
        row = np.repeat(np.arange(len(histories)), lengths)
        back = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        weights = self.decay**back
        recent = histories.items[np.repeat(ends, lengths) - 1 - back]
        users = sparse.csr_matrix((weights, (row, recent)), shape=(len(histories), self.similar.shape[0]))
        return torch.from_numpy((users @ self.similar).toarray()).float()


BASELINES: dict[str, type[Popularity] | type[ItemKnn]] = {"popularity": Popularity, "item_knn": ItemKnn}


def baselines(train: Histories, items: int) -> dict[str, Scorer]:
    """All baselines, fitted on the training events of a split."""
    return {name: fit(train, items) for name, fit in BASELINES.items()}

"""Baselines as scorers of the same harness: popularity, item-kNN; where items are described, TF-IDF, and both.

*A model that does not beat the kNN is not worth shipping.* Neither may be weakened.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sparse
import torch
from torch import Tensor

from encoders.catalogue import Catalogue, Histories
from encoders.closed_form import whitening
from encoders.cooccurrence import following
from encoders.evaluation.evaluate import Scorer, validation_ndcg
from encoders.evaluation.splits import Questions


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
        users = recent(histories, self.similar.shape[0], self.last, self.decay)
        return torch.from_numpy((users @ self.similar).toarray()).float()


class TfIdf:
    """Items like the user's last 10: words of title and description, attributes as they are, cosine of TF-IDF.

    The k-th last item weighs .8^k, as for the kNN. documents: the tokens of each item (`item_tokens`).
    """

    def __init__(self, documents: Sequence[Sequence[str]], *, last: int = 10, decay: float = 0.8) -> None:
        names: dict[str, int] = {}
        columns = [names.setdefault(token, len(names)) for tokens in documents for token in tokens]
        rows = np.repeat(np.arange(len(documents)), [len(tokens) for tokens in documents])
        counts = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(documents), max(1, len(names))))
        frequency = np.bincount(counts.indices, minlength=counts.shape[1])
        weighted = counts @ sparse.diags(np.log((1 + len(documents)) / (1 + frequency)) + 1)
        norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
        self.vectors = (sparse.diags(1 / np.maximum(norms, 1e-12)) @ weighted).tocsr()
        self.last, self.decay = last, decay

    def __call__(self, histories: Histories) -> Tensor:
        users = recent(histories, self.vectors.shape[0], self.last, self.decay)
        return torch.from_numpy((users @ self.vectors @ self.vectors.T).toarray()).float()


class Frozen:
    """Items like the user's last 10 by their content as it was encoded: nothing is trained.

    Each modality is whitened, which finds a third more and better (docs/LOG.md), and unit; side by side.
    """

    def __init__(self, catalogue: Catalogue, *, rank: int = 256, last: int = 10, decay: float = 0.8) -> None:
        parts = []
        for name, width in catalogue.modalities:
            rows, present = catalogue.content[name], catalogue.present[name]
            mean, basis = whitening(rows, present, min(rank, width))
            found = ((rows - mean) @ basis) * present[:, None]
            parts.append(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12))
        self.vectors = np.concatenate(parts, axis=1)
        self.last, self.decay = last, decay

    def __call__(self, histories: Histories) -> Tensor:
        users = recent(histories, len(self.vectors), self.last, self.decay)
        return torch.from_numpy(np.asarray(users @ self.vectors @ self.vectors.T, np.float32))


class Hybrid:
    """item-kNN + weight · TF-IDF, each divided by its best score for the user; the weight is chosen on validation."""

    def __init__(self, knn: Scorer, words: Scorer, validation: Questions, items: int) -> None:
        self.knn, self.words, self.weight = knn, words, 1.0
        found = {}
        for self.weight in HYBRID_WEIGHTS:
            found[self.weight] = validation_ndcg(self, validation, items)[1]
        self.weight = max(found, key=lambda weight: found[weight])

    def __call__(self, histories: Histories) -> Tensor:
        parts = [scores / scores.amax(dim=1, keepdim=True).clamp(min=1e-12)
                 for scores in (self.knn(histories), self.words(histories))]  # fmt: skip
        return parts[0] + self.weight * parts[1]


HYBRID_WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0)


def recent(histories: Histories, items: int, last: int, decay: float) -> sparse.csr_matrix:
    """The newest `last` items of each user, the k-th last weighing decay^k: sparse [Q, V]."""
    ends, lengths = histories.offsets[1:], np.minimum(histories.lengths, last)
    row = np.repeat(np.arange(len(histories)), lengths)
    back = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    newest = histories.items[np.repeat(ends, lengths) - 1 - back]
    return sparse.csr_matrix((decay**back, (row, newest)), shape=(len(histories), items))


def item_tokens(title: str | None, description: str | None, attributes: Mapping[str, Any]) -> list[str]:
    """What TF-IDF counts of an item: lower-case words, and attributes as name=value."""
    words = re.findall(r"\w+", f"{title or ''} {description or ''}".lower())
    lists = {name: value if isinstance(value, list) else [value] for name, value in attributes.items()}
    values = [(name, one) for name, found in lists.items() for one in found]
    return words + [f"{name}={value}".lower() for name, value in values if value not in (None, "")]


def baselines(
    train: Histories,
    items: int,
    documents: Sequence[Sequence[str]] = (),
    validation: Questions | None = None,
    catalogue: Catalogue | None = None,
) -> dict[str, Scorer]:
    """All baselines, fitted on the training events of a split; with documents (tokens of each item) those of content.

    validation: what the hybrid's weight is chosen on; without it there is no hybrid. catalogue: of the frozen content.
    """
    knn = ItemKnn(train, items)
    found: dict[str, Scorer] = {"popularity": Popularity(train, items), "item_knn": knn}
    if any(documents):
        found["tf_idf"] = words = TfIdf(documents)
        if validation is not None and len(validation):
            found["knn_tf_idf"] = Hybrid(knn, words, validation, items)
    if catalogue is not None and catalogue.modalities:
        found["frozen"] = Frozen(catalogue)
    return found

"""Which items follow each other: the statistics behind the SVD start of the ID embeddings and the item-kNN baseline.

Legend: V items, N events, D width.
"""

import numpy as np
import scipy.sparse as sparse

from encoders.catalogue import FloatArray, Histories, IntArray
from encoders.closed_form import ridge


def following(histories: Histories, items: int, window: int) -> sparse.csr_matrix:
    """Sum of 1/gap over all pairs (a, then b at most `window` events later, same user): sparse [V, V], row a."""
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    total = sparse.csr_matrix((items, items), dtype=np.float64)
    for gap in range(1, min(window, int(histories.lengths.max(initial=1)) - 1) + 1):
        same = owner[gap:] == owner[:-gap]
        first, second = histories.items[:-gap][same], histories.items[gap:][same]
        weights = np.full(len(first), 1.0 / gap)
        total = total + sparse.csr_matrix((weights, (first, second)), shape=(items, items))
    return total


def ppmi_vectors(histories: Histories, items: int, dim: int, seed: int, window: int = 5) -> FloatArray:
    """SVD start of the ID embeddings, [V, D], mean norm .02·√D, plus N(0, .02).

    Positive pointwise mutual information of co-occurrence within ±`window` events (weight 1/gap, context counts to the
    power .75), then a randomised SVD of rank D. Items that were never seen are small noise alone.
    """
    rng = np.random.default_rng([seed, 1])
    noise = rng.normal(0.0, 0.02, (items, dim)).astype(np.float32)
    counts = following(histories, items, window)
    ppmi = _ppmi((counts + counts.T).tocoo())
    if not ppmi.nnz:
        return noise
    left, values = _randomised_svd(ppmi, dim, rng)
    vectors = left * np.sqrt(values)
    scale = 0.02 * np.sqrt(dim) / max(float(np.linalg.norm(vectors, axis=1).mean()), 1e-12)
    padded = np.zeros((items, dim), dtype=np.float32)
    padded[:, : vectors.shape[1]] = vectors * scale
    return padded + noise


def _ppmi(counts: sparse.coo_matrix) -> sparse.csr_matrix:
    """max(0, log(p(a, b) / (p(a) p'(b)))) of a symmetric count matrix, p' being the smoothed context share."""
    total = np.asarray(counts.sum(axis=1)).ravel()
    context = total**0.75
    with np.errstate(divide="ignore"):
        information = np.log(counts.data * context.sum() / (total[counts.row] * context[counts.col]))
    positive = information > 0
    return sparse.csr_matrix((information[positive], (counts.row[positive], counts.col[positive])), shape=counts.shape)


def _randomised_svd(
    matrix: sparse.csr_matrix, rank: int, rng: np.random.Generator, rounds: int = 4
) -> tuple[FloatArray, FloatArray]:
    """Left singular vectors and values of the leading `rank` (Halko, Martinsson, Tropp 2011, algorithm 4.4)."""
    width = min(rank + 16, min(matrix.shape))
    basis, _ = np.linalg.qr(matrix @ rng.normal(size=(matrix.shape[1], width)))
    for _ in range(rounds):
        basis, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ basis)
    inner, values, _ = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    kept = min(rank, width)
    return (basis @ inner[:, :kept]).astype(np.float32), values[:kept].astype(np.float32)


def smoothed(
    vectors: FloatArray, counts: IntArray, content: FloatArray, events: float, strength: float = 10.0
) -> FloatArray:
    """Vectors of rare items drawn towards what their content predicts: (n·v + n0·v̂) / (n + n0), n0 = `events`.

    v̂ is the ridge regression of the vectors [V, D] on content [V, C] (zero rows: no content, no change), each item
    weighing log(1 + n), scaled to the vectors' mean norm. Items never seen become v̂.
    """
    has = np.abs(content).sum(axis=1) > 0
    predicted = content @ ridge(content, vectors, np.log1p(counts) * has, strength)
    norms = [float(np.linalg.norm(rows[has & (counts > 0)], axis=1).mean()) for rows in (vectors, predicted)]
    predicted *= norms[0] / max(norms[1], 1e-12)
    own = (counts / (counts + events))[:, None]
    mixed = own * vectors + (1 - own) * predicted
    return np.where(has[:, None], mixed, vectors).astype(np.float32)

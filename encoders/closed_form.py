"""What is solved rather than trained: whitening of content, and the ridge regression of item vectors on it.

Legend: V items, C width of the content, R rank, D width of the target.
"""

import numpy as np

from encoders.catalogue import BoolArray, FloatArray


def whitening(rows: FloatArray, present: BoolArray, rank: int) -> tuple[FloatArray, FloatArray]:
    """(mean [C], basis [C, R]): (row − mean) @ basis has R uncorrelated components of equal variance.

    The R directions of most variance; where the rows span fewer, the other columns are zero. Only rows that are
    present count; without any, both are zero.
    """
    mean, basis = np.zeros(rows.shape[1], np.float32), np.zeros((rows.shape[1], rank), np.float32)
    known = rows[present]
    if len(known) < 2:
        return mean, basis
    mean = known.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(known - mean, rowvar=False).reshape(len(mean), -1).astype(np.float64))
    order = np.argsort(values)[::-1][:rank]
    order = order[values[order] > 1e-7 * max(float(values[-1]), 1e-12)]
    basis[:, : len(order)] = vectors[:, order] / np.sqrt(values[order])
    return mean.astype(np.float32), basis


def ridge(content_VC: FloatArray, target_VD: FloatArray, weights_V: FloatArray, strength: float) -> FloatArray:
    """W [C, D] that minimises Σ_v w_v |x_v W − y_v|² + strength·|W|², by the normal equations."""
    weighted_VC = content_VC * weights_V[:, None]
    gram = weighted_VC.T @ content_VC + strength * np.eye(content_VC.shape[1])
    return np.asarray(np.linalg.solve(gram, weighted_VC.T @ target_VD), np.float32)

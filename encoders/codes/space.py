"""One space for all modalities, in closed form, so that a text can be compared with a picture.

SEMINAR (arXiv 2407.10714, §3.3) multiplies the codes of every modality with those of every other: that asks for vectors
of one width that agree, which its towers learn. Here they are solved for, and only from content: each modality is
whitened, the directions that the modalities share most are found (generalised canonical correlation, MAXVAR, by
Kettenring 1971), and each modality is mapped to them. Deviations: directions keep the weight of what is shared, and
rows have unit length.

Legend: V items, C_m width of a modality's content, D width of the space.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from encoders.catalogue import BoolArray, FloatArray
from encoders.closed_form import whitening

DIM = 64


@dataclass(frozen=True, eq=False)
class Placing:
    """Where one modality lies in the common space. mean: float32 [C_m]; directions: float32 [C_m, D]."""

    mean: FloatArray
    directions: FloatArray

    def __call__(self, content_NC: FloatArray) -> FloatArray:
        """Unit rows [N, D]; a row that has nothing in common with the others is zero."""
        placed = (content_NC - self.mean) @ self.directions
        lengths = np.linalg.norm(placed, axis=1, keepdims=True)
        rows: FloatArray = np.divide(placed, lengths, out=np.zeros_like(placed), where=lengths > 1e-6)
        return rows


def common_space(
    content: Mapping[str, FloatArray], present: Mapping[str, BoolArray], dim: int = DIM
) -> dict[str, Placing]:
    """The placing of every modality. content[m]: [V, C_m]; present[m]: which rows count.

    Where the contents span fewer than D directions, the rest of the space stays zero.
    """
    names = sorted(content)
    bases = {name: whitening(content[name], present[name], dim) for name in names}
    white = {
        name: np.where(present[name][:, None], (content[name] - mean) @ basis, 0)
        for name, (mean, basis) in bases.items()
    }
    counts = np.maximum(np.sum([present[name] for name in names], axis=0), 1)
    together = np.concatenate([white[name] for name in names], axis=1) / np.sqrt(counts)[:, None]
    _, vectors = np.linalg.eigh(together.T.astype(np.float64) @ together)
    shared = (together @ vectors[:, ::-1][:, :dim]).astype(np.float32)
    return {
        name: Placing(mean, (basis @ _regression(white[name], shared, int(present[name].sum()))).astype(np.float32))
        for name, (mean, basis) in bases.items()
    }


def _regression(white: FloatArray, shared: FloatArray, rows: int) -> FloatArray:
    """What predicts the shared directions from whitened rows: their covariance is the identity."""
    return np.asarray(white.T @ shared / max(rows, 1), np.float32)

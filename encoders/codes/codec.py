"""From content embeddings to codes: the space that all modalities share, a quantiser for each, one for semantic IDs.

Legend: N items, C_m width of a modality's content, D width of the space.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from encoders.catalogue import BoolArray, FloatArray
from encoders.codes.history import Codebooks, Coded
from encoders.codes.quantise import LEVELS, SUBSPACES, Codes, Product, Residual, train_product, train_residual
from encoders.codes.space import DIM, Placing, common_space


@dataclass(frozen=True, eq=False)
class Codec:
    """Modalities by name, in the order of their names; weights sum to 1.

    Modalities weigh the same where nobody says otherwise: SEMINAR learns its weights, from behaviour.
    """

    placings: Mapping[str, Placing]
    quantisers: Mapping[str, Product]
    names: Residual
    weights: Mapping[str, float]

    def encode(self, content: Mapping[str, FloatArray], present: Mapping[str, BoolArray]) -> "Encoded":
        """Codes of N items. content[m]: [N, C_m], present[m]: [N], of the codec's modalities."""
        placed = {name: placing(content[name]) for name, placing in self.placings.items()}
        codes = {name: quantiser.encode(placed[name]) for name, quantiser in self.quantisers.items()}
        cosines = {
            name: _cosines(placed[name], quantiser.decode(codes[name]))[present[name]]
            for name, quantiser in self.quantisers.items()
        }
        return Encoded(codes, self.names.encode(fused(placed, present, self.weights)), cosines)


@dataclass(frozen=True, eq=False)
class Encoded:
    """codes[m]: uint8 [N, subspaces]; semantic_ids: uint8 [N, levels].

    cosines[m]: of the items that have it, between the embedding in the common space and what its code stands for.
    """

    codes: Mapping[str, Codes]
    semantic_ids: Codes
    cosines: Mapping[str, FloatArray]


def train_codec(content: Mapping[str, FloatArray], present: Mapping[str, BoolArray], seed: int = 0) -> Codec:
    """A codec of these items. content[m]: [V, C_m]; present[m]: [V], each somewhere true. Raises ValueError else."""
    placings = common_space(content, present)
    placed = {name: placing(content[name]) for name, placing in placings.items()}
    weights = dict.fromkeys(placings, 1 / max(len(placings), 1))
    known = np.logical_or.reduce([present[name] for name in placings])
    return Codec(
        placings,
        {name: train_product(rows[present[name]], SUBSPACES, seed) for name, rows in placed.items()},
        train_residual(fused(placed, present, weights)[known], LEVELS, seed),
        weights,
    )


def fused(
    placed: Mapping[str, FloatArray], present: Mapping[str, BoolArray], weights: Mapping[str, float]
) -> FloatArray:
    """One unit row an item [N, D]: its modalities by their weights; zero where it has none."""
    size = len(next(iter(placed.values())))
    summed = np.zeros((size, DIM), np.float32)
    for name, rows in placed.items():
        summed += weights[name] * rows * present[name][:, None]
    lengths = np.linalg.norm(summed, axis=1, keepdims=True)
    unit: FloatArray = np.divide(summed, lengths, out=np.zeros_like(summed), where=lengths > 1e-6)
    return unit


def codebooks(centroids: Mapping[str, FloatArray], weights: Mapping[str, float]) -> Codebooks:
    """The search's view of quantisers: by name, padded with zeros where a modality has fewer centroids."""
    ordered = sorted(centroids)
    most = max(len(centroids[name][0]) for name in ordered)
    padded = [np.pad(centroids[name], ((0, 0), (0, most - centroids[name].shape[1]), (0, 0))) for name in ordered]
    return Codebooks(np.stack(padded), np.array([weights[name] for name in ordered], np.float32))


def coded(codes: Mapping[str, Codes], present: Mapping[str, BoolArray]) -> Coded:
    """The search's view of N items, modalities by name."""
    ordered = sorted(codes)
    return Coded(np.stack([codes[name] for name in ordered], 1), np.stack([present[name] for name in ordered], 1))


def _cosines(rows: FloatArray, others: FloatArray) -> FloatArray:
    """Cosine of each row with its counterpart; 1 where both are zero, for nothing was lost."""
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    products = np.einsum("nd,nd->n", rows, others)
    both = ~rows.any(axis=1) & ~others.any(axis=1)
    cosines: FloatArray = np.where(
        both, 1, np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    )
    return cosines

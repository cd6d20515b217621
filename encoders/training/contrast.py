"""MMSRec's pretraining (arXiv 2304.13277): items seen through other modalities, or twice, are to be found again.

It needs items and no histories, so that any catalogue can be learned from, and several at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from encoders.catalogue import Catalogue, Histories, IntArray
from encoders.config import TrainConfig
from encoders.towers.losses import combinations_contrast
from encoders.towers.mmsrec import MMSRec
from encoders.training.masked import described


@dataclass(frozen=True, eq=False)
class ItemBatch:
    """targets: int64 [P], the items of a step."""

    targets: Tensor
    users: tuple[int, ...] = ()


def rows(catalogue: Catalogue, train: Histories, config: TrainConfig, rng: np.random.Generator) -> IntArray:  # noqa: ARG001
    """All items of which anything is known, in any order: int64."""
    return rng.permutation(np.flatnonzero(described(catalogue)))


def batches(rows: IntArray, size: int, device: torch.device, *, share: int = 0, shares: int = 1) -> Iterator[ItemBatch]:
    """`size` items at a time. With several processes each contrasts its own share of a step."""
    for start in range(0, len(rows), size):
        part = slice(start + share, start + size, shares)
        yield ItemBatch(torch.from_numpy(rows[part]).to(device))


def loss(
    model: MMSRec,
    batch: ItemBatch,
    config: TrainConfig,
    warm: Tensor,  # noqa: ARG001
    frequency: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """(loss, detached; the same) of one step: `losses.combinations_contrast`."""
    encoder = model.user_tower
    tokens_NMD, present_NM = encoder.tokens(*model.content_of(batch.targets))
    modalities = torch.arange(present_NM.shape[1], device=present_NM.device)

    def twice(seen_NM: Tensor) -> tuple[Tensor, Tensor]:  # with other dropout
        return encoder.items(tokens_NMD, seen_NM), encoder.items(tokens_NMD, seen_NM)

    single = [twice(present_NM & (modalities == m)) for m in modalities]
    total = combinations_contrast(single, present_NM, twice(present_NM), config.temperature)
    return total.detach(), total

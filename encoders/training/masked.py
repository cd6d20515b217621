"""Masked items (MMSRec, arXiv 2304.13277): some events of a history and always its last are hidden, and guessed.

Legend: R rows (one history each), L places, B rows of a step, P masked places, U distinct items of the step, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from encoders.catalogue import BoolArray, Catalogue, Histories, IntArray
from encoders.config import TrainConfig
from encoders.towers import losses
from encoders.towers.mmsrec import MMSRec
from encoders.training.objective import draw_negatives
from encoders.training.packing import cut


@dataclass(frozen=True, eq=False)
class MaskedRows:
    """items: int64 [R, L], catalogue indices, −1 behind a history's end; masked: bool [R, L]; owners: int64 [R]."""

    items: IntArray
    masked: BoolArray
    owners: IntArray

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, eq=False)
class MaskedBatch:
    """Rows of one step: items int64 [B, L] (0 behind the end), real and masked bool [B, L], ahead int64 [B, L] (places
    after each one); targets int64 [P], the items at the masked places in row order."""

    items: Tensor
    real: Tensor
    masked: Tensor
    ahead: Tensor
    targets: Tensor
    users: list[int]


def described(catalogue: Catalogue) -> BoolArray:
    """Items of which the model can know anything: a row that is not zero in some modality, bool [V]."""
    known = [catalogue.present[name] & catalogue.content[name].any(axis=1) for name in catalogue.content]
    return np.any(known, axis=0) if known else np.zeros(len(catalogue), np.bool_)


def rows(catalogue: Catalogue, train: Histories, config: TrainConfig, rng: np.random.Generator) -> MaskedRows:
    """One epoch's histories, in steps of like length, which come in any order; events without content are left out.

    A history of more than `history` + 1 events is cut at a random offset.
    """
    known = train.keep(described(catalogue)[train.items])
    first, before, owners = cut(known, config.towers.history, rng)
    lengths = before + 1  # a window's last event is its [MASK]
    order = np.lexsort((rng.random(len(lengths)), lengths))
    steps = [order[start : start + config.batch_rows] for start in range(0, len(order), config.batch_rows)]
    order = np.concatenate([steps[step] for step in rng.permutation(len(steps))]) if steps else order
    places = np.arange(config.towers.history + 1)
    last = lengths[order, None] - 1
    items = np.where(places <= last, known.items[np.minimum(first[order, None] + places, len(known.items) - 1)], -1)
    masked = (places == last) | ((places < last) & (rng.random(items.shape) < config.mask_share))
    return MaskedRows(items, masked, owners[order])


def batches(
    rows: MaskedRows, size: int, device: torch.device, *, share: int = 0, shares: int = 1
) -> Iterator[MaskedBatch]:
    """The rows in order, `size` at a time; of these, the rows share, share + shares, …"""
    for start in range(0, len(rows), size):
        part = slice(start + share, start + size, shares)
        width = max(1, int((rows.items[part] >= 0).sum(axis=1).max(initial=0)))
        items = torch.from_numpy(rows.items[part, :width]).to(device)
        masked = torch.from_numpy(rows.masked[part, :width]).to(device)
        real = items >= 0
        ahead = (real.sum(dim=1, keepdim=True) - 1 - torch.arange(width, device=device)).clamp(min=0)
        yield MaskedBatch(items.clamp(min=0), real, masked, ahead, items[masked], sorted({*rows.owners[part].tolist()}))


def loss(
    model: MMSRec, batch: MaskedBatch, config: TrainConfig, warm: Tensor, frequency: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, detached; the same) of one step: softmax over shared negatives of the cosine with the hidden item, / τ."""
    drawn, bias = draw_negatives(config, warm, frequency, batch.targets)
    used, place = torch.unique(torch.cat([batch.items.flatten(), batch.targets, drawn]), return_inverse=True)
    inputs, targets, others = place.split([batch.items.numel(), len(batch.targets), len(drawn)])
    encoder = model.user_tower
    tokens_UMD, present_UM = encoder.tokens(*model.content_of(used))
    found_PD = guesses(model, batch, tokens_UMD[inputs], present_UM[inputs])
    wanted, at = torch.unique(torch.cat([targets, others]), return_inverse=True)
    items_WD = encoder.items(tokens_UMD[wanted], present_UM[wanted])
    of_target, of_other = at.split([len(targets), len(others)])
    told = present_UM[others].any(dim=1)  # an item without content is nowhere, and no negative
    column_W = torch.full((len(wanted),), -1, device=used.device)
    column_W[of_other[told]] = torch.arange(int(told.sum()), device=used.device)
    hits = torch.nonzero(column_W[of_target] >= 0).squeeze(1)
    negatives = losses.Negatives(items_WD[of_other[told]], bias[told], hits, column_W[of_target][hits])
    positive_P = (found_PD * items_WD[of_target]).sum(dim=1)
    used_P1 = torch.ones(len(targets), 1, dtype=torch.bool, device=used.device)
    total = losses.max_softmax(found_PD[:, None], used_P1, positive_P, negatives, config.temperature)
    return total.detach(), total


def guesses(model: MMSRec, batch: MaskedBatch, tokens_NMD: Tensor, present_NM: Tensor) -> Tensor:
    """The output at the masked places, [P, D]; tokens and presence: of all places of the batch, N = B · L."""
    shape = (*batch.items.shape, present_NM.shape[1])
    present_BLM = present_NM.view(shape) & batch.real[..., None]
    encoder = model.user_tower
    tokens_BLMD, present_BLM = encoder.masked(tokens_NMD.view(*shape, -1), present_BLM, batch.masked)
    # each row's masked places in front, as many as the row that has most
    counts_B = batch.masked.sum(dim=1)
    asked_BQ = batch.masked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(counts_B.max())]
    found_BQD = encoder.read(tokens_BLMD, present_BLM, batch.ahead, asked_BQ)
    return found_BQD[torch.arange(asked_BQ.shape[1], device=asked_BQ.device) < counts_B[:, None]]

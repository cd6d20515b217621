"""Content that learns: the ranking loss reaches the encoders (EM3, arXiv 2404.06078).

In a step some of the next items, a budget of them, are encoded as they are, by encoders with LoRA adapters in them.
Every other item has its frozen embedding and a low-rank *delta*, one map a modality: normalise(x + B·A·x). So a step
costs the budget, however long histories are. The abstract says no more than that LoRA is in the content-interest
sequence; what is inferred: which items are live; that an item has one vector in a step, as a target, as a negative and
in a history; and that the delta also learns to do to a live item's frozen embedding what the adapter did to its
encoding, since after training the adapted encoder embeds everything and the deltas are gone.

Legend: P positions of a step, N items asked for, L live items, V items of the catalogue, R rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.catalogue import Catalogue
from encoders.config import TrainConfig
from encoders.content.adapters import Adaptable, adapter_bytes, attach, is_adaptable
from encoders.content.encoder import ContentEncoder
from encoders.towers.content_source import Frozen, Modalities
from polytower.errors import UserError

_CHUNK = 512  # contents encoded at a time


@dataclass(frozen=True, eq=False)
class Live:
    """A modality that can be encoded while training. contents: by catalogue index, None where an item has none."""

    encoder: Adaptable
    contents: Sequence[Any]


def live_of(encoders: Mapping[str, ContentEncoder[Any]], contents: Mapping[str, Sequence[Any]]) -> dict[str, Live]:
    """The modalities whose encoders can be adapted, each with its contents by catalogue index.

    Raises UserError when there is none.
    """
    found = {name: Live(one, contents[name]) for name, one in encoders.items() if is_adaptable(one)}
    if not found:
        named = ", ".join(f"{name} ({one.model})" for name, one in encoders.items()) or "no content at all"
        raise UserError(
            f"training: lora_rank asks for encoders that can be adapted, and there is {named}: LoRA needs a transformer"
            " of text or pictures; set POLYTOWER_TEXT_ENCODER or POLYTOWER_IMAGE_ENCODER to one, load items that have"
            " such content, or leave the encoders frozen with lora_rank=0"
        )
    return found


class LiveRows(NamedTuple):
    """items: int64 [L], ascending; rows: [L, dim], with gradients."""

    items: Tensor
    rows: Tensor


class Delta(nn.Module):
    """x -> normalise(x + B·A·x), the identity at the start."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, rows_ND: Tensor) -> Tensor:
        """[N, dim] -> [N, dim], unit rows; zero rows stay."""
        return F.normalize(rows_ND + self.up(self.down(rows_ND)), dim=-1)


class Adapted(nn.Module):
    """Frozen embeddings with a delta; in a step, those of a few items encoded anew, with gradients into the adapters.

    The adapters' parameters are this module's, so that they are optimised, averaged and saved with the towers; the
    backbones are not. Outside of a step everything is read through the deltas.
    """

    def __init__(self, frozen: Frozen, live: Mapping[str, Live], config: TrainConfig) -> None:
        super().__init__()
        self.frozen, self.budget, self.delta_weight = frozen, config.encoder_budget, config.delta_weight
        self._live = dict(live)  # no modules: what they hold is not the towers'
        adapters = {
            name: attach(one.encoder, rank=config.lora_rank, layers=config.lora_layers) for name, one in live.items()
        }
        self.lora = nn.ModuleDict(
            {
                name: nn.ParameterDict({key.replace(".", "/"): value for key, value in found.items()})
                for name, found in adapters.items()
            }
        )
        self.delta = nn.ModuleDict({name: Delta(one.encoder.dim, config.delta_rank) for name, one in live.items()})
        present = [frozen.get_buffer(f"present_{name}") for name in live]
        self.register_buffer("encodable", torch.stack(present).any(dim=0), persistent=False)
        self._rows: dict[str, LiveRows] = {}

    def read(self, items_N: Tensor) -> tuple[Modalities, Modalities]:
        """As ContentSource."""
        content, present = self.frozen.read(items_N)
        changed = {name: self._read(name, items_N, content[name]) for name in self._live}
        return {**content, **changed}, present

    @contextmanager
    def step(self, targets_P: Tensor) -> Iterator[None]:
        """As ContentSource: at most `budget` of these items are live inside, drawn as often as they are asked for."""
        self._rows = self._encode(self._chosen(targets_P))
        try:
            yield
        finally:
            self._rows = {}

    def teaching_loss(self) -> Tensor | None:
        """Mean squared distance of the deltas' rows from the live ones, which are held fixed."""
        apart = [
            (self.delta[name](self.frozen.read(live.items)[0][name]) - live.rows.detach()).square().sum(dim=1).mean()
            for name, live in self._rows.items()
            if len(live.items)
        ]
        return self.delta_weight * torch.stack(apart).sum() if apart and self.delta_weight else None

    def adapters(self) -> dict[str, bytes]:
        """The adapters as they are, by modality (`adapters.adapter_bytes`)."""
        return {name: adapter_bytes(one.encoder) for name, one in self._live.items()}

    def encoded(self, catalogue: Catalogue) -> Catalogue:
        """The catalogue with the embeddings of the adapted encoders; what cannot be encoded any more is absent."""
        content, present = dict(catalogue.content), dict(catalogue.present)
        for name, one in self._live.items():
            there = np.flatnonzero(present[name])
            rows, found = np.zeros_like(content[name]), np.zeros_like(present[name])
            chunks = [there[start : start + _CHUNK] for start in range(0, len(there), _CHUNK)]
            results = one.encoder.encode_chunks([one.contents[item] for item in chunk] for chunk in chunks)
            for chunk, result in zip(chunks, results, strict=True):
                rows[chunk], found[chunk] = result.embeddings, True
                found[chunk[list(result.failures)]] = False
            content[name], present[name] = rows, found
        return Catalogue(catalogue.item_ids, content, present)

    def _read(self, name: str, items_N: Tensor, frozen_ND: Tensor) -> Tensor:
        rows_ND: Tensor = self.delta[name](frozen_ND)
        live = self._rows.get(name)
        if live is None or not len(live.items):
            return rows_ND
        place_N = torch.searchsorted(live.items, items_N).clamp(max=len(live.items) - 1)
        is_live_N1 = (live.items[place_N] == items_N)[:, None]
        read_ND: Tensor = torch.where(is_live_N1, live.rows[place_N].to(rows_ND.dtype), rows_ND)
        return read_ND

    def _chosen(self, targets_P: Tensor) -> Tensor:
        """Items to encode, int64 [≤ budget], distinct, ascending."""
        able_P = targets_P[self.get_buffer("encodable")[targets_P]]
        shuffled_P = able_P[torch.randperm(len(able_P), device=able_P.device)]
        # of each item its first place in the shuffled order; the first so many items by that place
        items_U, of_P = torch.unique(shuffled_P, return_inverse=True)
        first_U = torch.full_like(items_U, len(of_P)).scatter_reduce(
            0, of_P, torch.arange(len(of_P), device=of_P.device), "amin"
        )
        chosen_L: Tensor = items_U[first_U.argsort()[: self.budget]].sort().values
        return chosen_L

    def _encode(self, items_L: Tensor) -> dict[str, LiveRows]:
        found = {}
        for name, one in self._live.items():
            has_L = self.frozen.get_buffer(f"present_{name}")[items_L]
            asked = items_L[has_L]
            if not len(asked):
                continue
            places, rows = one.encoder.trained_rows([one.contents[item] for item in asked.tolist()])
            place_L = torch.tensor(places, device=asked.device, dtype=torch.int64)
            order_L = place_L.argsort()
            found[name] = LiveRows(asked[place_L[order_L]], rows.to(asked.device)[order_L.to(rows.device)])
        return found

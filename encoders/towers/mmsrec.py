"""MMSRec (arXiv 2304.13277): one encoder over what items are made of; an item is a history of length one.

Nothing of it belongs to an item: no ID, no table. So a trained encoder serves a catalogue that it has never seen.

- an event is M tokens, one a modality: LN(W_m f) + its place, counted from the end, + the kind of the modality. A
  modality that the item lacks is a token that nobody reads.
- L bidirectional transformer blocks over all L · M tokens; then Linear + LN for each modality, and the largest value a
  dimension over the modalities present.
- **user** = the output at a [MASK] behind the history; **item** = the output of a history that holds it alone.

Deviations from the paper: pre-LN blocks (the house's, `backbone.py`) instead of post-LN; one unit vector at the end,
since scores are cosines; the [MASK] has all modalities, so that it does not tell which ones the masked item has; a
start near the identity (a switch, `initial`).

Legend: B rows, L places, M modalities, Q places that are asked for, D width, N items, C width of all modalities
together, K = 1 interest.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig
from encoders.towers.backbone import Attention, Dropout, FeedForward, rows_at
from encoders.towers.content_tower import Features
from encoders.towers.model import ITEMS_ALONE, Context, Interests, ItemEmbeddings, Model, newest

Views = tuple[Tensor, Tensor]  # tokens [..., M, D], and which of them are there, bool [..., M]


def _start(linear: nn.Module, fill: Callable[[Tensor], Tensor]) -> None:
    assert isinstance(linear, nn.Linear)
    fill(linear.weight)
    nn.init.zeros_(linear.bias)


class Encoder(nn.Module):
    """Both sides of the model: `model.Reader` of histories and `model.Asked` of single items."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.config = config
        self.reads, self.widths = config.modalities, dict(config.modalities)
        self.width = sum(self.widths.values())
        self.features = Features(config)
        self.maps = nn.ModuleDict({name: nn.Linear(size, config.dim) for name, size in config.features})
        self.map_norms = nn.ModuleDict({name: nn.LayerNorm(config.dim) for name in self.widths})
        self.kind = nn.Parameter(torch.randn(len(self.widths), config.dim) * 0.02)
        self.place = nn.Parameter(torch.randn(config.history + 1, config.dim) * 0.02)
        self.mask = nn.Parameter(torch.randn(config.dim) * 0.02)
        self.dropout = Dropout(config.dropout)
        self.attention = nn.ModuleList(Attention(config) for _ in range(config.blocks))
        self.feed_forward = nn.ModuleList(FeedForward(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim)
        self.outs = nn.ModuleDict({name: nn.Linear(config.dim, config.dim) for name in self.widths})
        self.out_norms = nn.ModuleDict({name: nn.LayerNorm(config.dim) for name in self.widths})

    def start_near_identity(self) -> None:
        """Weights with which an item is nearly its features, and a user nearly the mean of the history's.

        Maps without loss of angles, attention whose values pass through, feed-forward branches that add nothing yet.
        From random weights the angles of frozen features, and with them most of what is known, are lost at first.
        """
        width = self.config.dim
        with torch.no_grad():
            for name in self.widths:
                _start(self.maps[name], nn.init.orthogonal_)
                _start(self.outs[name], nn.init.eye_)
            for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
                assert isinstance(attention, Attention)
                assert isinstance(feed_forward, FeedForward)
                nn.init.eye_(attention.project.weight[2 * width :])
                nn.init.zeros_(attention.project.bias)
                _start(attention.out, nn.init.eye_)
                _start(feed_forward.outer, nn.init.zeros_)

    def forward(self, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Items: content[m] [N, dim_m], present[m] bool [N]. Unit rows [N, D], zeros where nothing is present."""
        return self.items(*self.tokens(content, present))

    def tokens(self, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Views:
        """LN(W_m f) of each modality [N, M, D], and which of them are there, bool [N, M]."""
        # A zero row says nothing: it counts as absent, as it does in an event's row, which has no mask beside it.
        there = {name: present[name] & (content[name] != 0).any(dim=-1) for name in self.widths}
        parts = self.features.split(self.features(content, there))
        tokens = [
            self.map_norms[name](self.maps[name](part * part.shape[-1] ** 0.5))
            for name, part in zip(self.widths, parts, strict=True)
        ]
        return torch.stack(tokens, dim=1), torch.stack(list(there.values()), dim=1)

    def items(self, tokens_NMD: Tensor, present_NM: Tensor) -> Tensor:
        """Items as histories of length one, [N, D]; zero rows for items of which nothing is there."""
        alone_N1 = torch.zeros(len(tokens_NMD), 1, dtype=torch.int64, device=tokens_NMD.device)
        found = self.read(tokens_NMD[:, None], present_NM[:, None], alone_N1, alone_N1)[:, 0]
        return found * present_NM.any(dim=1, keepdim=True)

    def masked(self, tokens_BLMD: Tensor, present_BLM: Tensor, masked_BL: Tensor) -> Views:
        """The same with a [MASK] in all modalities where masked_BL holds: nothing of those items is left."""
        hidden = masked_BL[..., None]
        return torch.where(hidden[..., None], self.mask, tokens_BLMD), present_BLM | hidden

    def read(self, tokens_BLMD: Tensor, present_BLM: Tensor, ahead_BL: Tensor, asked_BQ: Tensor) -> Tensor:
        """Unit vectors [B, Q, D] at the places asked_BQ (int64 indices). ahead_BL: int64, places after each one."""
        modalities, width = tokens_BLMD.shape[-2:]
        states_BTD = self.dropout(tokens_BLMD + self.place[ahead_BL][:, :, None] + self.kind).flatten(1, 2)
        keys_BT = present_BLM.flatten(1)
        keys_BT = keys_BT | ~keys_BT.any(dim=1, keepdim=True)  # softmax needs one key; that row is of no use
        places_BT = ahead_BL.repeat_interleave(modalities, dim=1)
        of_each = torch.arange(modalities, device=asked_BQ.device)
        tokens_BP = (asked_BQ[..., None] * modalities + of_each).flatten(1)
        closed = keys_BT[:, None, None]
        *whole, last = zip(self.attention, self.feed_forward, strict=True)
        for attention, feed_forward in whole:
            states_BTD = feed_forward(attention(states_BTD, closed, places_BT))
        attention, feed_forward = last
        assert isinstance(attention, Attention)
        at_BP = places_BT.gather(1, tokens_BP)
        states_BPD = feed_forward(attention.at(rows_at(states_BTD, tokens_BP), states_BTD, closed, (at_BP, places_BT)))
        states_BQMD = self.norm(states_BPD).view(*asked_BQ.shape, modalities, width)
        outs = [self.out_norms[name](self.outs[name](states_BQMD[..., m, :])) for m, name in enumerate(self.widths)]
        present_BQM = rows_at(present_BLM, asked_BQ)
        lowest = torch.finfo(states_BQMD.dtype).min
        best_BQD = torch.where(present_BQM[..., None], torch.stack(outs, dim=-2), lowest).amax(dim=-2)
        return F.normalize(torch.where(present_BQM.any(dim=-1, keepdim=True), best_BQD, 0.0), dim=-1)

    def interests(self, events_BTX: Tensor, mask_BT: Tensor, context: Context = ITEMS_ALONE) -> Interests:
        """One interest a user: the output at a [MASK] behind the history. events_BTX: the modalities side by side.

        Events of items without content say nothing and take no place. Of more than `config.history` the newest count;
        a row without any gets what the model learned of the [MASK] alone.
        """
        events_BTC, mask_BT, _ = newest(
            events_BTX, mask_BT & (events_BTX != 0).any(dim=-1), context, self.config.history
        )
        parts = torch.split(events_BTC.flatten(0, 1), list(self.widths.values()), dim=1)
        real_N = mask_BT.flatten()
        content = dict(zip(self.widths, parts, strict=True))
        tokens_NMD, present_NM = self.tokens(content, dict.fromkeys(content, real_N))
        shape = (*mask_BT.shape, len(content))
        tokens_BLMD = F.pad(tokens_NMD.view(*shape, self.config.dim), (0, 0, 0, 0, 0, 1))  # room for the [MASK]
        present_BLM = F.pad(present_NM.view(shape), (0, 0, 0, 1))
        last_B1 = mask_BT.sum(dim=1, keepdim=True)
        places_L = torch.arange(tokens_BLMD.shape[1], device=mask_BT.device)
        tokens_BLMD, present_BLM = self.masked(tokens_BLMD, present_BLM, places_L == last_B1)
        vectors_B1D = self.read(tokens_BLMD, present_BLM, (last_B1 - places_L).clamp(min=0), last_B1)
        return Interests(vectors_B1D, torch.ones_like(vectors_B1D[..., 0]))


class MMSRec(Model):
    """The encoder over a catalogue."""

    user_tower: Encoder

    def __init__(self, config: TowersConfig, catalogue: Catalogue) -> None:
        super().__init__(config, catalogue)
        self.user_tower = Encoder(config)

    @property
    def content_tower(self) -> Encoder:
        """The user tower: there is one encoder."""
        return self.user_tower

    def embed(self, items_N: Tensor) -> ItemEmbeddings:
        """Content is all that an item is."""
        content_ND = self.user_tower(*self.content_of(items_N))
        has = (content_ND != 0).any(dim=1)
        return ItemEmbeddings(content_ND, torch.zeros_like(content_ND), content_ND, has, torch.zeros_like(has))

    def events(self, rows_BT: Tensor, items_VD: Tensor) -> Tensor:  # noqa: ARG002 (the items' vectors are the answer)
        """The items' modalities side by side, zeros where one is missing."""
        content, present = self.content_of(rows_BT)
        return torch.cat([content[name] * present[name][..., None] for name in content], dim=-1)

    def over(self, item_ids: Sequence[str], catalogue: Catalogue) -> Self:  # noqa: ARG002 (no item is known by its id)
        """Nothing belongs to an item, so nothing moves."""
        moved = type(self)(self.config, catalogue)
        moved.load_state_dict({name: value.cpu() for name, value in self.state_dict().items()})
        return moved.eval()

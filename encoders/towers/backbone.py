"""The causal transformer over a history's item embeddings.

Legend: B rows, T positions, Q query positions, H heads, D width. `allowed_BTT[b, q, t]` says whether position q may
read position t: causal within one user's segment of a packed row (training) or within the padded history of one user
(serving). A `mask` is what attention takes for it: bool [B, 1, Q, T], or float [B, H, Q, T] with relative biases.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.config import TowersConfig
from encoders.towers.positions import RelativeBias, rotated


class Dropout(nn.Module):
    """Dropout whose masks are drawn a byte an element: five times faster on a CPU than torch's own Bernoulli.

    The rate is rounded to 1/256. Seeded from torch's generator, so it repeats with it. On a GPU it is torch's dropout.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return values
        if values.device.type != "cpu":
            return F.dropout(values, self.rate)
        threshold = round(256 * self.rate)
        source = np.random.Generator(np.random.SFC64(int(torch.randint(2**62, ()))))
        kept = source.integers(0, 256, values.numel(), dtype=np.uint8) >= threshold
        scaled = torch.from_numpy(kept.view(np.uint8)).to(values.dtype).mul_(256 / (256 - threshold))
        return values * scaled.view_as(values)


class Branch(nn.Module):
    """A residual branch: x + dropout(f(norm(x))), or with a sigmoid gate on f, a function of x (eSASRec)."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.gate = nn.Linear(config.dim, config.dim) if config.residual == "gated" else None

    def add(self, states_BTD: Tensor, change_BTD: Tensor) -> Tensor:
        """The residual sum."""
        if self.gate is not None:
            change_BTD = change_BTD * torch.sigmoid(self.gate(states_BTD))
        added: Tensor = states_BTD + self.dropout(change_BTD)
        return added


class Attention(Branch):
    """Pre-LN multi-head attention."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__(config)
        self.heads = config.heads
        self.rotary = config.positions == "rotary"
        self.project = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, states_BTD: Tensor, mask: Tensor, positions_BT: Tensor) -> Tensor:
        projected = self.project(self.norm(states_BTD)).unflatten(-1, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        if self.rotary:
            query, key = rotated(query, positions_BT), rotated(key, positions_BT)
        mixed_BHTd = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.add(states_BTD, self.out(mixed_BHTd.transpose(1, 2).flatten(-2)))

    def at(self, query_BQD: Tensor, states_BTD: Tensor, mask: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """`forward` at the query positions alone: [B, Q, D]. query_BQD: the states there; places: [B, Q] and [B, T]."""
        width, normed_BTD = query_BQD.shape[-1], self.norm(states_BTD)
        weight, bias = self.project.weight, self.project.bias
        query = self._by_head(F.linear(self.norm(query_BQD), weight[:width], bias[:width]))
        pair_BTX = F.linear(normed_BTD, weight[width:], bias[width:])
        key, value = (self._by_head(part) for part in pair_BTX.chunk(2, dim=-1))
        if self.rotary:
            query, key = rotated(query, places[0]), rotated(key, places[1])
        mixed_BHQd = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.add(query_BQD, self.out(mixed_BHQd.transpose(1, 2).flatten(-2)))

    def _by_head(self, values_BTD: Tensor) -> Tensor:
        return values_BTD.view(*values_BTD.shape[:-1], self.heads, -1).transpose(1, 2)


class FeedForward(Branch):
    """Pre-LN feed-forward, 4 D wide with GELU, or SwiGLU of the same number of weights."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__(config)
        self.gated = config.feed_forward == "swiglu"
        width = 4 * config.dim * 2 // 3 if self.gated else 4 * config.dim
        self.inner = nn.Linear(config.dim, 2 * width if self.gated else width)
        self.outer = nn.Linear(width, config.dim)

    def forward(self, states_BTD: Tensor) -> Tensor:
        inner = self.inner(self.norm(states_BTD))
        if self.gated:
            gate, inner = inner.chunk(2, dim=-1)
            return self.add(states_BTD, self.outer(F.silu(gate) * inner))
        return self.add(states_BTD, self.outer(F.gelu(inner)))


class Recency(nn.Module):
    """A straight way from the newest items to the state: gain · Σ_t λ^(q − t) e_t over what a position may read.

    It is how item-kNN weighs a history, from the same λ = .8 on; λ and the gain (one per dimension) are learned. It
    takes fewer epochs, and finds more at depth (docs/LOG.md).
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(0.8).log().neg().log())
        self.gain = nn.Parameter(torch.ones(config.dim))

    def forward(self, items_BTD: Tensor, places: tuple[Tensor, Tensor], allowed_BQT: Tensor) -> Tensor:
        """places: int64 [B, Q] and [B, T], positions of the queries and of the items. [B, Q, D]."""
        since_BQT = (places[0][:, :, None] - places[1][:, None]).clamp(min=0)
        weights_BQT = torch.exp(-since_BQT * self.log_rate.exp()) * allowed_BQT
        pooled_BQD: Tensor = (weights_BQT @ items_BTD) * self.gain
        return pooled_BQD


class Backbone(nn.Module):
    """Scaled item embeddings + learned position of the event in its history, L blocks, final LayerNorm.

    The item embeddings come in at unit length; a learned scale sets how loud they are beside the positions.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(config.dim) ** 0.5 * 0.125))
        learned = config.positions == "learned"
        self.position = nn.Parameter(torch.randn(config.history, config.dim) * 0.02) if learned else None
        self.relative = RelativeBias(config) if config.relative != "none" else None
        self.recency = Recency(config) if config.recency else None
        self.dropout = Dropout(config.dropout)
        self.attention = nn.ModuleList(Attention(config) for _ in range(config.blocks))
        self.feed_forward = nn.ModuleList(FeedForward(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim)
        self.width = config.dim

    def forward(
        self,
        items_BTD: Tensor,
        positions_BT: Tensor,
        allowed_BTT: Tensor,
        queries_BQ: Tensor | None = None,
        times_BT: Tensor | None = None,
    ) -> Tensor:
        """items_BTD: unit item embeddings; positions_BT: int64, place of the event in its history. States [B, T, D].

        queries_BQ (int64): states at these positions alone, [B, Q, D]: the last block then does no work for the others.
        times_BT (int64, microseconds): when it happened, for relative time; without them its bias is left out.
        """
        inputs = items_BTD * self.scale
        states = self.dropout(inputs if self.position is None else inputs + self.position[positions_BT])
        whole = len(self.attention) - (queries_BQ is not None)
        places, allowed_BQT = (positions_BT, positions_BT), allowed_BTT
        if whole:
            mask = self._mask(allowed_BTT, places, times_BT, times_BT)
            for attention, feed_forward in zip(self.attention[:whole], self.feed_forward[:whole], strict=True):
                states = feed_forward(attention(states, mask, positions_BT))
        if queries_BQ is not None:
            places, allowed_BQT = (positions_BT.gather(1, queries_BQ), positions_BT), rows_at(allowed_BTT, queries_BQ)
            asked_at = None if times_BT is None else times_BT.gather(1, queries_BQ)
            mask = self._mask(allowed_BQT, places, asked_at, times_BT)
            last = self.attention[-1]
            assert isinstance(last, Attention)
            states = self.feed_forward[-1](last.at(rows_at(states, queries_BQ), states, mask, places))
        if self.recency is not None:
            states = states + self.dropout(self.recency(inputs, places, allowed_BQT))
        normed: Tensor = self.norm(states)
        return normed

    def _mask(
        self, allowed_BQT: Tensor, places: tuple[Tensor, Tensor], asked_at: Tensor | None, times_BT: Tensor | None
    ) -> Tensor:
        if self.relative is None:
            return allowed_BQT.unsqueeze(1)
        gaps_BQT = None if asked_at is None or times_BT is None else asked_at[:, :, None] - times_BT[:, None]
        bias_BHQT: Tensor = self.relative(places[0][:, :, None] - places[1][:, None], gaps_BQT)
        return bias_BHQT.masked_fill(~allowed_BQT.unsqueeze(1), float("-inf"))


class Backbones(nn.Module):
    """K transformers side by side that share nothing but the item embeddings: states of K · D, one part from each."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.each = nn.ModuleList(Backbone(config) for _ in range(config.interests))
        self.width = config.interests * config.dim

    def forward(self, *history: Tensor | None) -> Tensor:
        """As `Backbone.forward`, [B, T, K · D]."""
        return torch.cat([backbone(*history) for backbone in self.each], dim=-1)


def rows_at(values_BTX: Tensor, queries_BQ: Tensor) -> Tensor:
    """values_BTX[b, queries_BQ[b, q]] as [B, Q, X]."""
    return values_BTX.gather(1, queries_BQ[..., None].expand(-1, -1, values_BTX.shape[-1]))

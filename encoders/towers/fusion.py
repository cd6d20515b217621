"""Fusions: the modalities of an item, some of them missing, become one content vector.

Legend: N items, M modalities, H content width, D tower width. A fusion is a module with
`forward(parts_NMH, present_NM) -> [N, H]`; a missing modality must not change the result by its value.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from encoders.config import TowersConfig


class GatedSum(nn.Module):
    """Softmax-gated sum over the modalities present (SEMINAR's item fusion, arXiv 2407.10714).

    The gate of a modality is a linear function of its own features plus a bias, so that equal weights are only the
    start: equally weighted frozen modalities lose to the best one alone.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.score = nn.Linear(config.content_width, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(len(config.modalities)))
        nn.init.zeros_(self.score.weight)

    def forward(self, parts_NMH: Tensor, present_NM: Tensor) -> Tensor:
        logits_NM = self.score(parts_NMH).squeeze(-1) + self.bias
        return weighted(parts_NMH, logits_NM, present_NM)


class Attention(nn.Module):
    """Fusion-Q-Former with one learned query (EM3, arXiv 2404.06078): attention over [query; modalities], residual LN.

    The author's layer: 4 heads, no feed-forward; the query's output is the fused vector.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(config.content_width) * 0.02)
        self.kind = nn.Parameter(torch.zeros(len(config.modalities), config.content_width))
        self.attention = nn.MultiheadAttention(config.content_width, 4, batch_first=True)
        self.norm = nn.LayerNorm(config.content_width)

    def forward(self, parts_NMH: Tensor, present_NM: Tensor) -> Tensor:
        clean = torch.where(present_NM[..., None], parts_NMH + self.kind, 0.0)
        tokens = torch.cat([self.query.expand(len(clean), 1, -1), clean], dim=1)
        hidden = torch.cat([torch.zeros_like(present_NM[:, :1]), ~present_NM], dim=1)
        mixed, _ = self.attention(tokens[:, :1], tokens, tokens, key_padding_mask=hidden, need_weights=False)
        fused: Tensor = self.norm(tokens[:, 0] + mixed[:, 0])
        return fused


class Mean(nn.Module):
    """The plain mean over the modalities present: the control that a learned fusion must beat."""

    def __init__(self, config: TowersConfig) -> None:  # noqa: ARG002 (one signature for all fusions)
        super().__init__()

    def forward(self, parts_NMH: Tensor, present_NM: Tensor) -> Tensor:
        return weighted(parts_NMH, torch.zeros_like(parts_NMH[..., 0]), present_NM)


def weighted(parts_NMH: Tensor, logits_NM: Tensor, present_NM: Tensor) -> Tensor:
    """Softmax-weighted sum over the modalities present; zeros for an item that has none. [N, H]."""
    some_N1 = present_NM.any(dim=1, keepdim=True)
    masked = logits_NM.masked_fill(~present_NM & some_N1, float("-inf"))
    weights_NM = masked.softmax(dim=1) * present_NM
    return torch.einsum("nm,nmh->nh", weights_NM, torch.where(present_NM[..., None], parts_NMH, 0.0))


FUSIONS: dict[str, Callable[[TowersConfig], nn.Module]] = {
    "gated_sum": GatedSum,
    "attention": Attention,
    "mean": Mean,
}

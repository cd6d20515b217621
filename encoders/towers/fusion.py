"""Fusions: the modalities of an item, some of them missing, become one content vector.

Legend: N items, M modalities, H content width, Q queries, L tokens (Q + M). A fusion is a module with
`forward(parts_NMH, present_NM) -> [N, H]`. What stands in the row of a missing modality never changes the result, so
that a modality that is masked and one that the item never had are the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from encoders.config import TowersConfig

_HEADS = 4  # of the Q-Former, as in the author's layer


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


class QFormer(nn.Module):
    """Fusion-Q-Former (EM3, arXiv 2404.06078): layers of self-attention over [Q learned queries; modalities], each with
    a residual LayerNorm and no feed-forward; the Q outputs, flattened, go through one linear map.

    A learned vector a modality tells the tokens apart, which the paper's two projections do by themselves.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        width, queries = config.content_width, config.fusion_queries
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.kind = nn.Parameter(torch.zeros(len(config.modalities), width))
        layers = range(config.fusion_layers)
        self.attention = nn.ModuleList([nn.MultiheadAttention(width, _HEADS, batch_first=True) for _ in layers])
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in layers])
        self.project = nn.Linear(queries * width, width)

    def forward(self, parts_NMH: Tensor, present_NM: Tensor) -> Tensor:
        clean_NMH = torch.where(present_NM[..., None], parts_NMH + self.kind, 0.0)
        tokens_NLH = torch.cat([self.queries.expand(len(clean_NMH), -1, -1), clean_NMH], dim=1)
        hidden_NQ = torch.zeros(len(clean_NMH), len(self.queries), dtype=torch.bool, device=present_NM.device)
        hidden_NL = torch.cat([hidden_NQ, ~present_NM], dim=1)
        for attend, norm in zip(self.attention, self.norms, strict=True):
            mixed_NLH, _ = attend(tokens_NLH, tokens_NLH, tokens_NLH, key_padding_mask=hidden_NL, need_weights=False)
            tokens_NLH = norm(tokens_NLH + mixed_NLH)
        fused_NH: Tensor = self.project(tokens_NLH[:, : len(self.queries)].flatten(1))
        return fused_NH


class ConcatMlp(nn.Module):
    """All modalities side by side, zeros for a missing one, through two layers: order and absence are both seen."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        width, modalities = config.content_width, len(config.modalities)
        self.layers = nn.Sequential(nn.Linear(modalities * width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, parts_NMH: Tensor, present_NM: Tensor) -> Tensor:
        fused_NH: Tensor = self.layers(torch.where(present_NM[..., None], parts_NMH, 0.0).flatten(1))
        return fused_NH


class Maximum(nn.Module):
    """The largest value a dimension over the modalities present (MMSRec, arXiv 2304.13277)."""

    def __init__(self, config: TowersConfig) -> None:  # noqa: ARG002 (one signature for all fusions)
        super().__init__()

    def forward(self, parts_NMH: Tensor, present_NM: Tensor) -> Tensor:
        lowest = torch.finfo(parts_NMH.dtype).min
        best_NH = torch.where(present_NM[..., None], parts_NMH, lowest).amax(dim=1)
        return torch.where(present_NM.any(dim=1)[:, None], best_NH, 0.0)


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
    weights_NM = masked.softmax(dim=1).masked_fill(~present_NM, 0.0)
    return torch.einsum("nm,nmh->nh", weights_NM, torch.where(present_NM[..., None], parts_NMH, 0.0))


FUSIONS: dict[str, Callable[[TowersConfig], nn.Module]] = {
    "gated_sum": GatedSum,
    "qformer": QFormer,
    "concat": ConcatMlp,
    "max": Maximum,
    "mean": Mean,
}

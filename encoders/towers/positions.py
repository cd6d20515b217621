"""Where and when, as attention sees it: learned biases by distance and by time difference, and rotary positions.

Legend: B rows, Q query positions, T positions, H heads, d width of a head, N buckets.
"""

from typing import Any

import torch
from torch import Tensor, nn

from encoders.config import TowersConfig

_BASE = 0.301  # width of a bucket in natural logarithms, as in HSTU's code: a factor of 1.35
BUCKETS = 72  # the last one begins at e^(71 x .301) seconds, sixty years


class RelativeBias(nn.Module):
    """What attention adds to its logits, by head: a learned number per bucket of the distance in events (Raffel et al.
    2020, T5) and of the time between the two events (Zhai et al. 2024, HSTU, arXiv 2402.17152), shared by all blocks.

    Buckets are log-spaced, the same for events and for seconds. All biases start at zero. Deviation from HSTU: the time
    is counted from the newest event that is read, not from the event asked for, which nobody knows when serving.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        kind = config.relative
        self.position = nn.Parameter(torch.zeros(config.heads, BUCKETS)) if kind in ("position", "both") else None
        self.time = nn.Parameter(torch.zeros(config.heads, BUCKETS)) if kind in ("time", "both") else None
        self.heads = config.heads

    def forward(self, distances_BQT: Tensor, gaps_BQT: Tensor | None) -> Tensor:
        """distances_BQT: int64 events between query and key; gaps_BQT: int64 microseconds. Bias [B, H, Q, T].

        Without gaps the time bias is left out.
        """
        total = torch.zeros(len(distances_BQT), self.heads, *distances_BQT.shape[1:], device=distances_BQT.device)
        if self.position is not None:
            total = total + looked_up(self.position, buckets(distances_BQT.float()))
        if self.time is not None and gaps_BQT is not None:
            total = total + looked_up(self.time, buckets(gaps_BQT.double().div(1e6).float()))
        return total


def buckets(distances: Tensor) -> Tensor:
    """floor(ln(1 + distance) / .301), at most the last bucket: int64. What lies ahead counts as distance 0."""
    return distances.clamp(min=0).log1p().div(_BASE).long().clamp(max=BUCKETS - 1)


def looked_up(table_HN: Tensor, buckets_BQT: Tensor) -> Tensor:
    """table_HN[h, buckets_BQT] as [B, H, Q, T]. Its gradient is a count by bucket, not torch's indexed addition, which
    takes a hundred times longer where a million places share seventy rows.
    """
    found: Tensor = _LookUp.apply(table_HN, buckets_BQT)  # type: ignore[no-untyped-call]
    return found


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_HN: Tensor, buckets_BQT: Tensor) -> Tensor:
        ctx.save_for_backward(buckets_BQT)
        ctx.size = table_HN.shape[1]
        rows = [row.index_select(0, buckets_BQT.flatten()).view_as(buckets_BQT) for row in table_HN]
        return torch.stack(rows, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (buckets_BQT,) = ctx.saved_tensors
        flat = buckets_BQT.flatten()
        sums = [
            torch.bincount(flat, weights=of_head.flatten(), minlength=ctx.size)
            for of_head in gradients[0].unbind(dim=1)
        ]
        return torch.stack(sums).to(gradients[0].dtype), None


def rotated(vectors_BHTd: Tensor, positions_BT: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs of dimensions (i, i + d/2) turned by position x 10000^(-2i/d)."""
    half = vectors_BHTd.shape[-1] // 2
    speeds = 10_000.0 ** (-torch.arange(half, device=vectors_BHTd.device) / half)
    angles_B1Td = (positions_BT.unsqueeze(-1) * speeds).unsqueeze(1)
    cosine, sine = angles_B1Td.cos(), angles_B1Td.sin()
    one, two = vectors_BHTd.chunk(2, dim=-1)
    return torch.cat([one * cosine - two * sine, one * sine + two * cosine], dim=-1)

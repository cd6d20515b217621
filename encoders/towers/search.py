"""Search in a long history, by candidate: SEMINAR's GSU and ESU with shared projections (arXiv 2407.10714).

The general search unit finds, for each head, the K events of a history that are most relevant to a candidate; the exact
search unit attends to those alone. Both score by the same W_q and W_k, so what is found is what is attended to. Memory
is bounded: a history is read a block at a time, however long it is.

Legend: C candidates, T events, H heads, K found events, D width, d = D / H.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Events that are scored at once: 64 candidates with four heads take 2 MB.
EVENTS_BLOCK = 2048


class Found(NamedTuple):
    """indices: int64 [C, H, K], places in the history, best first, -1 where it has fewer than K events; attention:
    [C, H, K], non-negative, sum 1 over the found events, 0 at the places of -1.
    """

    indices: Tensor
    attention: Tensor


class SearchUnit(nn.Module):
    """W_q, W_k and how sharp attention is (learned, from 10 on: vectors are unit). Untrained, each head is a cosine of
    its part of the vectors.
    """

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} dimensions do not divide into {heads} heads")
        self.heads = heads
        self.query, self.key, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        for layer in (self.query, self.key, self.out):
            nn.init.eye_(layer.weight)
        self.log_sharpness = nn.Parameter(torch.tensor(10.0).log())

    def search(self, candidates_CD: Tensor, history_TD: Tensor, k: int) -> Found:
        """The K most relevant events for each candidate and head, and the attention that they get."""
        query_HCd = self._by_head(self.query(candidates_CD))
        best_HCK, places_HCK = self._top(query_HCd, history_TD, k)
        found_HCK = places_HCK >= 0
        # absent places are masked before and after: an infinite score has no gradient
        scores_HCK = torch.where(found_HCK, best_HCK, 0.0) * self.log_sharpness.exp()
        attention = scores_HCK.masked_fill(~found_HCK, torch.finfo(scores_HCK.dtype).min).softmax(dim=-1)
        attention = torch.where(found_HCK, attention, 0.0)
        return Found(places_HCK.transpose(0, 1), attention.transpose(0, 1))

    def forward(self, candidates_CD: Tensor, history_TD: Tensor, k: int) -> Tensor:
        """What the history says of each candidate: a cosine, [C]; 0 for a history without events."""
        found = self.search(candidates_CD, history_TD, k)
        if not len(history_TD):
            return candidates_CD.sum(dim=1) * 0
        events_THd = history_TD.view(len(history_TD), self.heads, -1)
        head_1H1 = torch.arange(self.heads, device=history_TD.device)[None, :, None]
        taken_CHKd = events_THd[found.indices.clamp(min=0), head_1H1]
        read_CD = (found.attention[..., None] * taken_CHKd).sum(dim=2).flatten(1)
        return F.cosine_similarity(self.out(read_CD), candidates_CD, dim=1)

    def _top(self, query_HCd: Tensor, history_TD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and places [H, C, K] of the best, kept from block to block."""
        shape = (*query_HCd.shape[:2], k)
        best = torch.full(shape, float("-inf"), device=query_HCd.device)
        places = torch.full(shape, -1, dtype=torch.int64, device=query_HCd.device)
        for start in range(0, len(history_TD), EVENTS_BLOCK):
            key_HTd = self._by_head(self.key(history_TD[start : start + EVENTS_BLOCK]))
            scores_HCT = query_HCd @ key_HTd.transpose(1, 2)
            here = torch.arange(start, start + scores_HCT.shape[2], device=scores_HCT.device).expand_as(scores_HCT)
            scores, both = torch.cat([best, scores_HCT], dim=2), torch.cat([places, here], dim=2)
            best, order = scores.topk(k, dim=2)
            places = both.gather(2, order)
        return best, places

    def _by_head(self, values_ND: Tensor) -> Tensor:
        return values_ND.view(len(values_ND), self.heads, -1).transpose(0, 1)


def histogram(candidates_CD: Tensor, history_TD: Tensor) -> Tensor:
    """SimTier (Taobao, MUSE): log(1 + events) per bin of the cosine, width .1 from -1; [C, 20]. Vectors are unit."""
    counts = torch.zeros(len(candidates_CD), 20, device=candidates_CD.device)
    for start in range(0, len(history_TD), EVENTS_BLOCK):
        cosines_CT = candidates_CD @ history_TD[start : start + EVENTS_BLOCK].T
        bins = ((cosines_CT + 1) * 10).long().clamp(0, 19)
        counts.scatter_add_(1, bins, torch.ones_like(cosines_CT))
    return counts.log1p()

"""(query, item) pairs: an event is what was searched for together with what was taken (SEMINAR, arXiv 2407.10714).

pair = α·query + (1−α)·item, α = ½, or a gate that looks at both. An event without a query is its item. The question of
a user who searches is a pair as well: its query is there, its item is not known yet, and the state of the history
stands in for it.

Deviations: the paper has a row for each query; here a query is a map of its text embedding, so that one that nobody has
typed before has its place too. A query has unit length, as items do.

Legend: B rows, T positions, Q query positions, W width of a text embedding, D width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.config import TowersConfig
from encoders.towers.backbone import Dropout


class Share(nn.Module):
    """α: a constant, or σ of a linear map of [query; other] for each dimension, which starts at the constant."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.constant = config.pair_share
        self.gate = nn.Linear(2 * config.dim, config.dim) if config.pair == "gated" else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, float(torch.tensor(self.constant).logit()))

    def forward(self, query: Tensor, other: Tensor) -> Tensor:
        """[..., D] or a scalar, in (0, 1)."""
        if self.gate is None:
            return torch.tensor(self.constant, device=query.device)
        share: Tensor = torch.sigmoid(self.gate(torch.cat([query, other], dim=-1)))
        return share


class Pairs(nn.Module):
    """The map of queries into the space of items, and how a query joins an item or a state."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.query_dim, config.dim, bias=False)
        self.inner = nn.Linear(config.query_dim, config.query_width)
        self.outer = nn.Linear(config.query_width, config.dim)
        self.dropout = Dropout(config.content_dropout)
        self.of_event, self.of_question = Share(config), Share(config)

    def queries(self, texts: Tensor) -> Tensor:
        """Text embeddings [..., W], zeros for no query -> [..., D]: unit rows, and zeros where there is no query."""
        there = (texts != 0).any(dim=-1, keepdim=True)
        # elements of size one, as a layer expects them
        loud = self.dropout(texts * texts.shape[-1] ** 0.5)
        mapped = self.linear(texts) + self.outer(self.dropout(F.gelu(self.inner(loud))))
        unit: Tensor = F.normalize(mapped, dim=-1) * there
        return unit

    def forward(self, texts_BTW: Tensor, items_BTD: Tensor) -> Tensor:
        """The pairs of a history, [B, T, D]; an event without a query is its item."""
        return _joined(self.of_event, self.queries(texts_BTW), items_BTD)

    def ask(self, texts_BQW: Tensor, states_BQD: Tensor) -> Tensor:
        """States joined with what is searched for now, as loud as they were; untouched where nothing is."""
        loud_BQ1: Tensor = states_BQD.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        joined_BQD: Tensor = _joined(self.of_question, self.queries(texts_BQW), states_BQD / loud_BQ1)
        return joined_BQD * loud_BQ1


def _joined(share: Share, query: Tensor, other: Tensor) -> Tensor:
    alpha: Tensor = share(query, other) * (query != 0).any(dim=-1, keepdim=True)
    return alpha * query + (1 - alpha) * other

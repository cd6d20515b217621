"""Interest extractors: the states of a history become K vectors, for one query position or for every prefix at once.

Legend: B rows, Q query positions (T in training, where every prefix is a training example; 1 at serving time),
T history positions, D width, K interests. An extractor is a module with
`forward(query_BQD, states_BTD, allowed_BQT) -> [B, Q, K, D]` (not normalised): query_BQD are the states at the query
positions, allowed_BQT says which positions each query may read. Nothing else may influence a query's interests.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.config import TowersConfig


class Heads(nn.Module):
    """K linear heads on the query position's state, residual: v_k = h + W_k h. K = 1 is h itself.

    The heads start small: all interests begin near h, which is the K = 1 model, and part where that pays.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.interests = config.interests
        self.head = nn.Linear(config.dim, config.dim * config.interests) if config.interests > 1 else None
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.1 * config.dim**-0.5)
            nn.init.zeros_(self.head.bias)

    def forward(self, query_BQD: Tensor, states_BTD: Tensor, allowed_BQT: Tensor) -> Tensor:  # noqa: ARG002
        if self.head is None:
            return query_BQD.unsqueeze(2)
        change: Tensor = self.head(query_BQD).unflatten(-1, (self.interests, -1))
        return query_BQD.unsqueeze(2) + change


class Apart(nn.Module):
    """K user towers: each interest is the state of a transformer of its own (`backbone.Backbones`)."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.interests = config.interests

    def forward(self, query_BQD: Tensor, states_BTD: Tensor, allowed_BQT: Tensor) -> Tensor:  # noqa: ARG002
        return query_BQD.view(*query_BQD.shape[:-1], self.interests, -1)


class Attentive(nn.Module, ABC):
    """Interests that are sums over the history by attention weights, which a loss may look at."""

    @abstractmethod
    def attention(self, query_BQD: Tensor, states_BTD: Tensor, allowed_BQT: Tensor) -> Tensor:
        """How much of each position goes into each interest, [B, Q, K, T]: sum 1, zero where it may not read."""

    @abstractmethod
    def read(self, attention_BQKT: Tensor, query_BQD: Tensor, states_BTD: Tensor) -> Tensor:
        """The interests of these weights, [B, Q, K, D]."""

    def forward(self, query_BQD: Tensor, states_BTD: Tensor, allowed_BQT: Tensor) -> Tensor:
        return self.read(self.attention(query_BQD, states_BTD, allowed_BQT), query_BQD, states_BTD)


class SelfAttentive(Attentive):
    """ComiRec-SA: A = softmax_T(W2ᵀ tanh(W1 H)), V = A H (Cen et al., KDD 2020, §3.2; W1 is 4D×D, W2 is 4D×K).

    Deviation: positions are already in H, and the softmax runs over each query's prefix.
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.score = nn.Linear(4 * config.dim, config.interests, bias=False)

    def attention(self, query_BQD: Tensor, states_BTD: Tensor, allowed_BQT: Tensor) -> Tensor:  # noqa: ARG002
        logits_BTK = self.score(torch.tanh(self.hidden(states_BTD)))
        return attention_weights(logits_BTK.transpose(1, 2).unsqueeze(1), allowed_BQT)

    def read(self, attention_BQKT: Tensor, query_BQD: Tensor, states_BTD: Tensor) -> Tensor:  # noqa: ARG002
        return torch.einsum("bqkt,btd->bqkd", attention_BQKT, states_BTD)


class QueryTokens(Attentive):
    """K learned query tokens attend to the prefix (one head), added to the query position's state."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(config.interests, config.dim) * config.dim**-0.5)
        self.key = nn.Linear(config.dim, config.dim, bias=False)
        self.value = nn.Linear(config.dim, config.dim, bias=False)

    def attention(self, query_BQD: Tensor, states_BTD: Tensor, allowed_BQT: Tensor) -> Tensor:
        asked_BQKD = self.tokens + query_BQD.unsqueeze(2)
        logits = torch.einsum("bqkd,btd->bqkt", asked_BQKD, self.key(states_BTD)) * self.tokens.shape[-1] ** -0.5
        return attention_weights(logits, allowed_BQT)

    def read(self, attention_BQKT: Tensor, query_BQD: Tensor, states_BTD: Tensor) -> Tensor:
        return query_BQD.unsqueeze(2) + torch.einsum("bqkt,btd->bqkd", attention_BQKT, self.value(states_BTD))


class Routing(nn.Module, ABC):
    """Dynamic routing (MIND, Li et al., CIKM 2019; ComiRec-DR), 3 iterations.

    Each position hands itself out by a softmax over the interests. Gradients flow through the last iteration only, as
    in the released code.
    """

    def __init__(self, config: TowersConfig, iterations: int = 3) -> None:
        super().__init__()
        self.interests, self.iterations = config.interests, iterations

    @abstractmethod
    def capsules(self, states_BTD: Tensor) -> Tensor:
        """What each position says to each interest: [B, T, K, D]."""

    @abstractmethod
    def initial(self, states_BTD: Tensor) -> Tensor:
        """Routing logits before the first iteration: [B, T, K]."""

    def forward(self, query_BQD: Tensor, states_BTD: Tensor, allowed_BQT: Tensor) -> Tensor:  # noqa: ARG002
        capsules_BTKD = self.capsules(states_BTD)
        frozen_BTKD = capsules_BTKD.detach()
        logits_BQTK = self.initial(states_BTD).unsqueeze(1).expand(-1, allowed_BQT.shape[1], -1, -1)
        for _ in range(self.iterations - 1):
            found = squash(routed(logits_BQTK, frozen_BTKD, allowed_BQT))
            logits_BQTK = logits_BQTK + torch.einsum("bqkd,btkd->bqtk", found, frozen_BTKD).detach()
        return squash(routed(logits_BQTK, capsules_BTKD, allowed_BQT))


class MindRouting(Routing):
    """MIND: one bilinear map S shared by all interests, fixed random initial logits that tell the interests apart.

    Deviation: the logits are a fixed random projection of the state (a buffer) rather than numbers per position, so
    that the same history gives the same interests wherever it stands in a packed row.
    """

    projection: Tensor

    def __init__(self, config: TowersConfig) -> None:
        super().__init__(config)
        self.bilinear = nn.Linear(config.dim, config.dim, bias=False)
        self.register_buffer("projection", torch.randn(config.dim, config.interests) * config.dim**-0.5)

    def capsules(self, states_BTD: Tensor) -> Tensor:
        shared_BTD: Tensor = self.bilinear(states_BTD)
        return shared_BTD.unsqueeze(2).expand(-1, -1, self.interests, -1)

    def initial(self, states_BTD: Tensor) -> Tensor:
        return states_BTD.detach() @ self.projection


class ComirecRouting(Routing):
    """ComiRec-DR: a map S_k of its own for each interest, zero initial logits."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__(config)
        self.bilinear = nn.Linear(config.dim, config.dim * config.interests, bias=False)

    def capsules(self, states_BTD: Tensor) -> Tensor:
        own: Tensor = self.bilinear(states_BTD).unflatten(-1, (self.interests, -1))
        return own

    def initial(self, states_BTD: Tensor) -> Tensor:
        return torch.zeros_like(states_BTD[..., :1]).expand(-1, -1, self.interests)


def attention_weights(logits_BQKT: Tensor, allowed_BQT: Tensor) -> Tensor:
    """Softmax over the allowed positions, zero elsewhere: [B, Q, K, T]."""
    closed = ~allowed_BQT.unsqueeze(2)
    weights = logits_BQKT.masked_fill(closed, torch.finfo(logits_BQKT.dtype).min).softmax(dim=-1)
    return weights.masked_fill(closed, 0.0)


def routed(logits_BQTK: Tensor, capsules_BTKD: Tensor, allowed_BQT: Tensor) -> Tensor:
    """One routing step: every allowed position hands itself out over the interests: [B, Q, K, D]."""
    weights_BQTK = logits_BQTK.softmax(dim=-1) * allowed_BQT.unsqueeze(-1)
    return torch.einsum("bqtk,btkd->bqkd", weights_BQTK, capsules_BTKD)


def squash(vectors: Tensor) -> Tensor:
    """‖z‖²/(1+‖z‖²)·z/‖z‖ along the last dimension."""
    squared = vectors.square().sum(dim=-1, keepdim=True)
    return squared / (1 + squared) * F.normalize(vectors, dim=-1)


EXTRACTORS: dict[str, Callable[[TowersConfig], nn.Module]] = {
    "heads": Heads,
    "towers": Apart,
    "comirec_sa": SelfAttentive,
    "query_tokens": QueryTokens,
    "mind": MindRouting,
    "comirec_dr": ComirecRouting,
}

# extractors that read the states at the query positions and no others: those are all that serving has to compute
READ_QUERY_ONLY = frozenset({"heads", "towers"})

"""Retrieval metrics as pure functions of ranks and lists.

Legend: Q questions, N targets, V items, L list length, K interests. Ranks are 1 for the best; a miss is any rank
beyond L. A question has one target, unless `sets_N` says which question each target belongs to.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Lists whose vectors are looked at together: of ten items and 64 dimensions, 10 MB.
LISTS = 4096


def ranks(scores_QV: Tensor, targets_Q: Tensor, hidden_QV: Tensor | None = None) -> Tensor:
    """Rank of each target among all items, int64 [Q], ties broken against the model.

    hidden_QV (bool) takes items out of the ranking; a target that is itself hidden, or whose score is NaN, ranks last
    (V), for it would not be shown.
    """
    scores_QV = scores_QV.nan_to_num(nan=float("-inf"))
    target_Q1 = scores_QV.gather(1, targets_Q[:, None])
    ahead_QV = scores_QV >= target_Q1
    lost_Q = target_Q1.squeeze(1) == float("-inf")
    if hidden_QV is not None:
        ahead_QV &= ~hidden_QV
        lost_Q |= hidden_QV.gather(1, targets_Q[:, None]).squeeze(1)
    # the target is ahead of itself, which is the 1 of its rank
    return torch.where(lost_Q, scores_QV.shape[1], ahead_QV.sum(dim=1))


def recall(ranks_N: Tensor, k: int, sets_N: Tensor | None = None) -> float:
    """Mean of `hits`; for one target a question the share of those found (= hit rate). 0 for no questions."""
    return _mean(hits(ranks_N, k, sets_N))


def ndcg(ranks_N: Tensor, k: int, sets_N: Tensor | None = None) -> float:
    """Mean of `gains`; 0 for no questions."""
    return _mean(gains(ranks_N, k, sets_N))


def hits(ranks_N: Tensor, k: int, sets_N: Tensor | None = None) -> Tensor:
    """Targets among the first k, divided by as many as could be there, min(k, size of the set): [Q]."""
    found_N = (ranks_N <= k).double()
    if sets_N is None:
        return found_N
    return _summed(found_N, sets_N) / sets_N.bincount().clamp(max=k)


def gains(ranks_N: Tensor, k: int, sets_N: Tensor | None = None) -> Tensor:
    """Sum of 1/log2(1 + rank) of the targets among the first k, divided by its ideal: [Q]."""
    found_N = torch.where(ranks_N <= k, 1.0 / torch.log2(1.0 + ranks_N.double()), 0.0)
    if sets_N is None:
        return found_N
    ideal = (1.0 / torch.log2(torch.arange(2, k + 2).double())).cumsum(dim=0)
    return _summed(found_N, sets_N) / ideal[sets_N.bincount().clamp(max=k) - 1]


def mrr(ranks_N: Tensor, sets_N: Tensor | None = None) -> float:
    """Mean reciprocal rank of a question's best target, over the whole ranking."""
    if sets_N is not None and len(ranks_N):
        best = torch.full((int(sets_N.max()) + 1,), torch.iinfo(torch.int64).max)
        ranks_N = best.scatter_reduce(0, sets_N, ranks_N, "amin")
    return _mean(1.0 / ranks_N.double())


def coverage(lists_QL: Tensor, items: int) -> float:
    """Share of the catalogue that appears in at least one list."""
    return int(torch.bincount(lists_QL.flatten(), minlength=items).count_nonzero()) / items if items else 0.0


def intra_list_diversity(lists_QL: Tensor, vectors_VD: Tensor) -> float:
    """Mean over lists of the mean of 1 − cosine over all pairs of the list; 0 for lists of fewer than 2 items."""
    length = lists_QL.shape[1]
    if length < 2:
        return 0.0
    unit_VD = F.normalize(vectors_VD, dim=-1)
    sums = [unit_VD.new_zeros(0)]
    for part_QL in torch.split(lists_QL, LISTS):
        unit_QLD = unit_VD[part_QL]
        sums.append(unit_QLD.sum(dim=1).square().sum(dim=-1) - unit_QLD.square().sum(dim=(1, 2)))
    return _mean(1.0 - (torch.cat(sums) / (length * (length - 1))).double())


def interest_shares(owners_QL: Tensor, interests: int) -> list[float]:
    """Share of all candidates that each interest brought, K numbers of sum 1 (zeros for no candidates)."""
    counts = torch.bincount(owners_QL.flatten(), minlength=interests).double()
    return [float(share) for share in counts / counts.sum().clamp(min=1)]


def _summed(values_N: Tensor, sets_N: Tensor) -> Tensor:
    size = int(sets_N.max()) + 1 if len(sets_N) else 0
    return torch.zeros(size, dtype=values_N.dtype).index_add(0, sets_N, values_N)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0

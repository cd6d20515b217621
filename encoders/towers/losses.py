"""Losses: how interests are taught by the next item, what keeps them apart, what teaches the content embeddings.

Legend: P training positions, K interests, N negatives shared by all positions of a step, D width.
An objective is `(interests_PKD, used_PK, positives_PD, negatives, τ) -> scalar`, the mean over positions. used_PK
(bool): interests in use. Those of SEVERAL_TARGETS take positives [P, S, D] too, S targets a position. All are pure
functions of tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_UNUSED = -1e4  # finite: a row of K-1 unused interests must not make a NaN
_CHUNK, _CHUNK_GPU = 256, 8192  # positions of the fused softmax at a time, half of them for several interests


@dataclass(frozen=True, eq=False)
class Negatives:
    """vectors [N, D], distinct items; bias [N] is added to the scaled score (the logQ correction, zeros without one).

    rows (int64, ascending), columns: the position whose positive is that negative; such a pair does not count.
    """

    vectors: Tensor
    bias: Tensor
    rows: Tensor
    columns: Tensor


Objective = Callable[[Tensor, Tensor, Tensor, Negatives, float], Tensor]
Repel = Callable[[Tensor, float], Tensor]


def consistent(
    interests_PKD: Tensor, used_PK: Tensor, positives_PD: Tensor, negatives: Negatives, tau: float
) -> Tensor:
    """Sampled softmax on the serving score s(u, i) = max_k v_k·e_i, for positives and negatives alike (MTMI, §1).

    ComiRec and REMI score every negative by the positive's interest; serving never does.
    """
    positive = _scores_of_positive(interests_PKD, used_PK, positives_PD).amax(dim=1)
    return max_softmax(interests_PKD, used_PK, positive, negatives, tau)


def soft_consistent(
    interests_PKD: Tensor, used_PK: Tensor, positives_PD: Tensor, negatives: Negatives, tau: float
) -> Tensor:
    """`consistent` with τ·logsumexp_k(v_k·e/τ) in place of the maximum: every interest gets a gradient."""
    positive = tau * (_scores_of_positive(interests_PKD, used_PK, positives_PD) / tau).logsumexp(dim=1)
    return max_softmax(interests_PKD, used_PK, positive, negatives, tau, soft=True)


def comirec(interests_PKD: Tensor, used_PK: Tensor, positives_PD: Tensor, negatives: Negatives, tau: float) -> Tensor:
    """ComiRec's hard routing: k* = argmax_k v_k·e_pos scores the positive and all negatives."""
    chosen_PD, positive_P = _chosen(interests_PKD, used_PK, positives_PD)
    return max_softmax(chosen_PD.unsqueeze(1), used_PK[:, :1], positive_P, negatives, tau)


def remi(
    interests_PKD: Tensor,
    used_PK: Tensor,
    positives_PD: Tensor,
    negatives: Negatives,
    tau: float,
    beta: float = 1.0,
) -> Tensor:
    """REMI: ComiRec's routing with hard negatives weighed up, w_j = exp(β s_j) / mean_j exp(β s_j)."""
    chosen_PD, positive_P = _chosen(interests_PKD, used_PK, positives_PD)
    scaled_PN = chosen_PD @ negatives.vectors.T / tau
    sharp_PN = beta * scaled_PN.detach()
    log_weights = sharp_PN.log_softmax(dim=1) + torch.tensor(float(len(negatives.vectors))).log()
    return _softmax_loss(positive_P / tau, scaled_PN + log_weights, negatives)


def label_aware(
    interests_PKD: Tensor,
    used_PK: Tensor,
    positives_PD: Tensor,
    negatives: Negatives,
    tau: float,
    power: float = 2.0,
) -> Tensor:
    """MIND's label-aware attention: the user vector is Σ_k softmax_k(pow(v_k·e_pos, p)) v_k, for every candidate.

    Deviation: with unit vectors the power acts on the score divided by τ as a factor p: the power of a cosine below 1
    would flatten what it is meant to sharpen.
    """
    scores_PK = _scores_of_positive(interests_PKD, used_PK, positives_PD)
    attention_PK = (power * scores_PK / tau).softmax(dim=1)
    user_PD = F.normalize(torch.einsum("pk,pkd->pd", attention_PK, interests_PKD), dim=-1)
    return max_softmax(user_PD.unsqueeze(1), used_PK[:, :1], (user_PD * positives_PD).sum(dim=1), negatives, tau)


def max_softmax(
    interests_PKD: Tensor,
    used_PK: Tensor,
    positive_P: Tensor,
    negatives: Negatives,
    tau: float,
    *,
    soft: bool = False,
) -> Tensor:
    """Mean of −log(e^{s⁺/τ} / (e^{s⁺/τ} + Σ_j e^{max_k v_k·n_j/τ + b_j})); positive_P are the scores s⁺. Scalar.

    positive_P may be [P, S], several targets: log(Σ_s e^{s⁺_s/τ} + Σ_j …) − mean_s s⁺_s/τ, one pass over the negatives.

    soft: Σ_k e^{v_k·n_j/τ} stands for e^{max_k …}; s⁺ may then exceed 1, by τ·log K at most.

    Fused: loss and gradients of a few positions at a time, in a buffer [K, chunk, N] that stays in the cache. The plain
    expression passes a [P, K, N] block through memory a dozen times, which is most of a step on a CPU. Scores must be
    cosines (≤ 1): 1/τ takes the place of the running maximum of the softmax.
    """
    loss: Tensor = _MaxSoftmax.apply(  # type: ignore[no-untyped-call]
        interests_PKD,
        used_PK,
        positive_P,
        negatives.vectors,
        negatives.bias,
        negatives.rows,
        negatives.columns,
        tau,
        soft,
    )
    return loss


class _MaxSoftmax(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(  # type: ignore[no-untyped-def]
        ctx, interests_PKD, used_PK, positive_P, vectors_ND, bias_N, rows, columns, tau: float, soft: bool
    ) -> Tensor:
        positions, interests, _ = interests_PKD.shape
        size = (_CHUNK_GPU if interests_PKD.is_cuda else _CHUNK) // (1 if interests == 1 else 2)
        # two more dimensions carry the bias of a negative and the exclusion of an unused interest through the GEMM
        closed_PK1 = (~used_PK).to(interests_PKD.dtype).mul(_UNUSED).unsqueeze(2)
        users_KPX = torch.cat([interests_PKD / tau, torch.ones_like(closed_PK1), closed_PK1], dim=2).transpose(0, 1)
        biased_XN = torch.cat([vectors_ND, (bias_N - 1 / tau)[:, None], torch.ones_like(bias_N)[:, None]], dim=1).T
        own_PS = positive_P.view(positions, -1) / tau - 1 / tau
        total_P = own_PS.exp().sum(dim=1)
        to_interests_PKD, to_vectors_ND = torch.empty_like(interests_PKD), torch.zeros_like(vectors_ND)
        buffer = vectors_ND.new_empty(interests * min(size, positions) * len(vectors_ND))
        starts = list(range(0, positions, size))
        edges = torch.searchsorted(rows, torch.tensor([*starts, positions], device=rows.device)).tolist()
        for chunk, start in enumerate(starts):
            part = slice(start, min(start + size, positions))
            count = part.stop - start
            energy_KCN = buffer[: interests * count * len(vectors_ND)].view(interests, count, -1)
            energy_XN = energy_KCN.view(interests * count, -1)
            torch.mm(users_KPX[:, part].flatten(0, 1), biased_XN, out=energy_XN)
            hits = slice(edges[chunk], edges[chunk + 1])
            energy_KCN[:, rows[hits] - start, columns[hits]] = _UNUSED
            total_P[part] += energy_KCN.exp_().sum(dim=(0, 2)) if soft else _energies(energy_KCN)
            scale_C1 = (total_P[part] * (tau * positions)).reciprocal().unsqueeze(1)
            to_interests_PKD[part] = (energy_XN @ vectors_ND).view(interests, count, -1).mul_(scale_C1).transpose(0, 1)
            to_vectors_ND.addmm_(energy_XN.T, (interests_PKD[part].transpose(0, 1) * scale_C1).flatten(0, 1))
        to_positive_PS = (own_PS.exp() / total_P[:, None] - 1 / own_PS.shape[1]) / (tau * positions)
        ctx.save_for_backward(to_interests_PKD, to_positive_PS.view_as(positive_P), to_vectors_ND)
        loss: Tensor = (total_P.log() - own_PS.mean(dim=1)).mean()
        return loss

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def backward(ctx, *gradients: Any):  # type: ignore[no-untyped-def]
        interests, positive, vectors = (part * gradients[0] for part in ctx.saved_tensors)
        return interests, None, positive, vectors, None, None, None, None, None


def _energies(scores_KCN: Tensor) -> Tensor:
    """Sum over N of exp(max over K), [C]; in place, what is left is exp where an interest is the best, 0 elsewhere.

    The arithmetic with signs does the work of a comparison: masks of booleans are ten times slower on a CPU.
    """
    if len(scores_KCN) == 1:
        return scores_KCN.exp_().sum(dim=2).squeeze(0)
    best_CN = torch.maximum(scores_KCN[0], scores_KCN[1])
    for scores_CN in scores_KCN[2:]:
        torch.maximum(best_CN, scores_CN, out=best_CN)
    scores_KCN.sub_(best_CN).sign_().add_(1)
    scores_KCN.mul_(best_CN.exp_())
    return best_CN.sum(dim=1)


def weight_loss(interests_PKD: Tensor, weights_PK: Tensor, positives_PD: Tensor) -> Tensor:
    """Cross-entropy of the interest weights against the interest that the next item turned out to belong to: scalar.

    The interests are held fixed, so the weights become the calibrated share of next items per interest.
    """
    owner_P = _scores_of_positive(interests_PKD, weights_PK > 0, positives_PD).detach().argmax(dim=1)
    chosen = weights_PK.gather(1, owner_P[:, None]).squeeze(1)
    return -chosen.clamp(min=1e-8).log().mean()


def attention_variance(attention_PKT: Tensor, width: int) -> Tensor:
    """REMI's routing regulariser ‖diag((A − Ā)(A − Ā)ᵀ / D)‖²: interests shall not each hang on one event. Scalar.

    attention_PKT: rows of sum 1 over the events read, 0 elsewhere; Ā is the mean over those; width: D. Deviation: the
    mean over positions instead of the sum over the batch, as for every other loss here (Xie et al., RecSys 2023, §3.3).
    """
    read_PKT = attention_PKT > 0
    mean_PK1 = attention_PKT.sum(dim=-1, keepdim=True) / read_PKT.sum(dim=-1, keepdim=True).clamp(min=1)
    variance_PK = ((attention_PKT - mean_PK1) * read_PKT).square().sum(dim=-1) / width
    return variance_PK.square().sum(dim=-1).mean()


def content_contrast(content_ND: Tensor, items_ND: Tensor, tau: float) -> Tensor:
    """Content-ID contrast (EM3, arXiv 2404.06078), symmetric InfoNCE within the sampled items: scalar.

    The item embeddings are the teacher and get no gradient, so that content learns the taste space of the warm items
    without pulling at it. Deviation: all other sampled items are negatives (the paper takes 16).
    """
    return info_nce(content_ND, items_ND.detach(), tau)


def info_nce(left_ND: Tensor, right_ND: Tensor, tau: float) -> Tensor:
    """Symmetric InfoNCE of unit vectors: row n of one side belongs to row n of the other, all others are negatives."""
    logits = left_ND @ right_ND.T / tau
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def content_id_contrast(content_NH: Tensor, id_NH: Tensor, tau: float, negatives: int = 16) -> Tensor:
    """Content-ID contrast as EM3 has it (arXiv 2404.06078, its authors' code): scalar.

    ½[CE(c' → {i'} ∪ 16 i' of other items) + CE(i' → {c'} ∪ 16 c' of other items)] on unit rows c', i' of the same N
    items; gradients go both ways. Deviation: the others are drawn from the step's items, with repeats. Zero for N < 2.
    """
    size = len(content_NH)
    if size < 2:
        return content_NH.new_zeros(())
    own_N1 = torch.arange(size, device=content_NH.device)[:, None]
    further = torch.randint(1, size, (size, negatives), device=content_NH.device)
    asked = torch.cat([own_N1, (own_N1 + further) % size], dim=1)
    first = torch.zeros(size, dtype=torch.int64, device=content_NH.device)
    return (
        F.cross_entropy(torch.einsum("nh,nkh->nk", content_NH, id_NH[asked]) / tau, first)
        + F.cross_entropy(torch.einsum("nh,nkh->nk", id_NH, content_NH[asked]) / tau, first)
    ) / 2


def combinations_contrast(
    single: Sequence[tuple[Tensor, Tensor]], present_NM: Tensor, whole: tuple[Tensor, Tensor], tau: float
) -> Tensor:
    """MMSRec's contrast of feature combinations (arXiv 2304.13277): scalar.

    single[m]: items seen through modality m alone, twice with other dropout; whole: through all, likewise; [N, D],
    unit. With two modalities ¼[NCE(v1, v2) + NCE(v1, t1) + NCE(t1, t2) + NCE(vt1, vt2)]. Deviations: for M of them the
    mean over each with itself, each pair, and the whole (which is the one modality, if there is but one); an item that
    lacks a modality has no part in that modality's terms, and a term of fewer than two items is left out.
    """
    terms = [(first, second, present_NM[:, m]) for m, (first, second) in enumerate(single)]
    for m, n in combinations(range(len(single)), 2):
        terms.append((single[m][0], single[n][0], present_NM[:, m] & present_NM[:, n]))
    if len(single) > 1:
        terms.append((*whole, present_NM.any(dim=1)))
    found = [info_nce(left[has], right[has], tau) for left, right, has in terms if int(has.sum()) > 1]
    return torch.stack(found).mean() if found else whole[0].sum() * 0


def repel_none(interests_PKD: Tensor, margin: float) -> Tensor:  # noqa: ARG001
    """No repel."""
    return interests_PKD.new_zeros(())


def repel_cosine(interests_PKD: Tensor, margin: float) -> Tensor:
    """Hinge on the cosine: mean over pairs of relu(cos(v_a, v_b) - margin)."""
    return F.relu(_cosines(interests_PKD) - margin).mean()


def repel_orthogonal(interests_PKD: Tensor, margin: float) -> Tensor:  # noqa: ARG001
    """Orthogonality: ‖V Vᵀ − I‖²_F / (K(K−1)), which is the mean squared cosine over pairs."""
    return _cosines(interests_PKD).square().mean()


def repel_volume(interests_PKD: Tensor, margin: float) -> Tensor:
    """Volume: −logdet(V Vᵀ + εI) per interest, with ε = margin."""
    interests = interests_PKD.shape[1]
    gram = interests_PKD @ interests_PKD.transpose(1, 2)
    eye = torch.eye(interests, device=gram.device, dtype=gram.dtype)
    volume: Tensor = torch.linalg.slogdet(gram + max(margin, 1e-3) * eye).logabsdet.mean()
    return -volume / interests


def repel_distance(interests_PKD: Tensor, margin: float) -> Tensor:
    """Hinge on the distance: mean over pairs of relu(margin − ‖v_a − v_b‖)."""
    squared = (2 - 2 * _cosines(interests_PKD)).clamp(min=1e-8)
    return F.relu(margin - squared.sqrt()).mean()


OBJECTIVES: dict[str, Objective] = {
    "consistent": consistent,
    "soft_consistent": soft_consistent,
    "comirec": comirec,
    "remi": remi,
    "label_aware": label_aware,
}

# the objectives that do not choose an interest by the one target
SEVERAL_TARGETS = ("consistent", "soft_consistent")

REPELS: dict[str, Repel] = {
    "none": repel_none,
    "cosine": repel_cosine,
    "orthogonal": repel_orthogonal,
    "volume": repel_volume,
    "distance": repel_distance,
}


def _scores_of_positive(interests_PKD: Tensor, used_PK: Tensor, positives_PD: Tensor) -> Tensor:
    """[P, K], or for positives [P, S, D] [P, K, S]."""
    if positives_PD.dim() == 3:
        scores_PKS = torch.einsum("pkd,psd->pks", interests_PKD, positives_PD)
        return scores_PKS.masked_fill(~used_PK[..., None], _UNUSED)
    scores_PK = torch.einsum("pkd,pd->pk", interests_PKD, positives_PD)
    return scores_PK.masked_fill(~used_PK, _UNUSED)


def _chosen(interests_PKD: Tensor, used_PK: Tensor, positives_PD: Tensor) -> tuple[Tensor, Tensor]:
    scores_PK = _scores_of_positive(interests_PKD, used_PK, positives_PD)
    best_P, index_P = scores_PK.max(dim=1)
    return interests_PKD[torch.arange(len(index_P), device=index_P.device), index_P], best_P


def _softmax_loss(positive_P: Tensor, negative_PN: Tensor, negatives: Negatives) -> Tensor:
    """Softmax loss of scaled scores, by plain autograd."""
    open_PN = torch.zeros_like(negative_PN).index_put(
        (negatives.rows, negatives.columns), negative_PN.new_tensor(float("-inf"))
    )
    logits = torch.cat([positive_P.unsqueeze(1), negative_PN + negatives.bias + open_PN], dim=1)
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()


def _cosines(interests_PKD: Tensor) -> Tensor:
    """Cosines of all pairs a < b, [P, K(K−1)/2]; one zero column for K = 1."""
    interests = interests_PKD.shape[1]
    if interests == 1:
        return interests_PKD.new_zeros(len(interests_PKD), 1)
    left, right = torch.triu_indices(interests, interests, 1, device=interests_PKD.device)
    return (interests_PKD[:, left] * interests_PKD[:, right]).sum(dim=-1)

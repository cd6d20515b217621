"""Objectives against plain expressions, repels by hand; every registered one is differentiable and finite."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.towers import losses

TAU = 0.1


def case(interests: int = 3, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, losses.Negatives]:
    """6 positions, 5 negatives; the positive of position 2 is negative 4; the last interest of position 0 is unused."""
    torch.manual_seed(interests)
    interests_PKD = F.normalize(torch.randn(6, interests, 4, dtype=dtype), dim=-1)
    positives_PD = F.normalize(torch.randn(6, 4, dtype=dtype), dim=-1)
    vectors_ND = F.normalize(torch.randn(5, 4, dtype=dtype), dim=-1)
    vectors_ND[4] = positives_PD[2]
    used_PK = torch.ones(6, interests, dtype=torch.bool)
    used_PK[0, -1] = interests == 1
    negatives = losses.Negatives(vectors_ND, torch.randn(5, dtype=dtype), torch.tensor([2]), torch.tensor([4]))
    return interests_PKD, used_PK, positives_PD, negatives


def softmax_reference(positive_P: Tensor, negative_PN: Tensor, negatives: losses.Negatives) -> Tensor:
    logits = torch.cat([positive_P[:, None], negative_PN], dim=1) / TAU
    logits[:, 1:] += negatives.bias
    logits[negatives.rows, 1 + negatives.columns] = float("-inf")
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


@pytest.mark.parametrize("interests", [1, 3])
def test_consistent_scores_everything_by_the_best_interest(interests: int) -> None:
    vectors, used, positives, negatives = case(interests)
    scores = (vectors @ negatives.vectors.T).masked_fill(~used[..., None], -9).amax(dim=1)
    own = torch.einsum("pkd,pd->pk", vectors, positives).masked_fill(~used, -9).amax(dim=1)
    expected = softmax_reference(own, scores, negatives)
    torch.testing.assert_close(losses.consistent(vectors, used, positives, negatives, TAU), expected)


@pytest.mark.parametrize("name", losses.SEVERAL_TARGETS)
@pytest.mark.parametrize("interests", [1, 3])
def test_several_targets_share_one_pass_over_the_negatives(name: str, interests: int) -> None:
    """log(Z + Σ_s e^{o_s}) − mean_s o_s, its gradients, and one target said in both ways."""
    vectors, used, positives, negatives = case(interests)
    objective = losses.OBJECTIVES[name]
    torch.testing.assert_close(
        objective(vectors, used, positives[:, None], negatives, TAU),
        objective(vectors, used, positives, negatives, TAU),
    )
    several = torch.stack([positives, positives.roll(1, dims=0), positives.roll(2, dims=0)], dim=1)

    def soft(scores: Tensor) -> Tensor:
        return scores.amax(dim=1) if name == "consistent" else TAU * (scores / TAU).logsumexp(dim=1)

    def plain(vectors: Tensor, several: Tensor, others: Tensor) -> Tensor:
        own = soft(torch.einsum("pkd,psd->pks", vectors, several).masked_fill(~used[..., None], -9))
        energy = soft((vectors @ others.T).masked_fill(~used[..., None], -9)) / TAU + negatives.bias
        energy = energy.index_put((negatives.rows, negatives.columns), energy.new_tensor(float("-inf")))
        return (torch.cat([energy, own / TAU], dim=1).logsumexp(dim=1) - own.mean(dim=1) / TAU).mean()

    def fused(vectors: Tensor, several: Tensor, others: Tensor) -> Tensor:
        return objective(vectors, used, several, replace(negatives, vectors=others), TAU)

    found = []
    for loss in (plain, fused):
        leaves = [one.clone().requires_grad_() for one in (vectors, several, negatives.vectors)]
        value = loss(*leaves)
        found.append([value, *torch.autograd.grad(value, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_comirec_scores_negatives_by_the_interest_of_the_positive() -> None:
    vectors, used, positives, negatives = case()
    own, chosen = torch.einsum("pkd,pd->pk", vectors, positives).masked_fill(~used, -9).max(dim=1)
    expected = softmax_reference(own, vectors[torch.arange(6), chosen] @ negatives.vectors.T, negatives)
    torch.testing.assert_close(losses.comirec(vectors, used, positives, negatives, TAU), expected)


def test_remi_with_equal_weights_is_comirec() -> None:
    vectors, used, positives, negatives = case()
    torch.testing.assert_close(
        losses.remi(vectors, used, positives, negatives, TAU, beta=0.0),
        losses.comirec(vectors, used, positives, negatives, TAU),
    )


def test_label_aware_is_minds_attention_over_the_interests() -> None:
    vectors, used, positives, negatives = case()
    scores = torch.einsum("pkd,pd->pk", vectors, positives).masked_fill(~used, -9)
    user = F.normalize(((2 * scores / TAU).softmax(dim=1)[..., None] * vectors).sum(dim=1), dim=-1)
    expected = softmax_reference((user * positives).sum(dim=1), user @ negatives.vectors.T, negatives)
    torch.testing.assert_close(losses.label_aware(vectors, used, positives, negatives, TAU), expected)


def test_attention_variance_by_hand() -> None:
    """Three events, of which the second query reads two: variances .06 / 4 and 0, .5 / 4 and .02 / 4."""
    attention = torch.tensor([[[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]], [[1.0, 1e-9, 0.0], [0.6, 0.4, 0.0]]])
    spread = ((0.5 - 1 / 3) ** 2 + (0.3 - 1 / 3) ** 2 + (0.2 - 1 / 3) ** 2) / 4
    expected = (spread**2 + (0.5 / 4) ** 2 + (0.02 / 4) ** 2) / 2
    assert losses.attention_variance(attention, 4).item() == pytest.approx(expected, rel=1e-5)


def test_soft_consistent_lets_every_interest_count() -> None:
    vectors, used, positives, negatives = case()
    scores = (vectors @ negatives.vectors.T).masked_fill(~used[..., None], -9)
    own = torch.einsum("pkd,pd->pk", vectors, positives).masked_fill(~used, -9)
    expected = softmax_reference(TAU * (own / TAU).logsumexp(dim=1), TAU * (scores / TAU).logsumexp(dim=1), negatives)
    torch.testing.assert_close(losses.soft_consistent(vectors, used, positives, negatives, TAU), expected)


def test_soft_consistent_is_consistent_for_one_interest() -> None:
    given = case(1)
    torch.testing.assert_close(losses.soft_consistent(*given, TAU), losses.consistent(*given, TAU))


def test_the_fused_softmax_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case()
    whole = losses.consistent(*given, TAU)
    monkeypatch.setattr(losses, "_CHUNK", 4)
    torch.testing.assert_close(losses.consistent(*given, TAU), whole)


@pytest.mark.parametrize("interests", [1, 3])
def test_the_fused_softmax_has_the_gradients_of_finite_differences(interests: int) -> None:
    vectors, used, positives, negatives = case(interests)

    def loss(vectors: Tensor, positive: Tensor, drawn: Tensor) -> Tensor:
        moved = losses.Negatives(drawn, negatives.bias, negatives.rows, negatives.columns)
        return losses.max_softmax(vectors, used, positive, moved, TAU)

    own = torch.einsum("pkd,pd->pk", vectors, positives).amax(dim=1)
    inputs = [part.detach().requires_grad_() for part in (vectors, own, negatives.vectors)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", losses.OBJECTIVES)
@pytest.mark.parametrize("interests", [1, 4])
def test_every_objective_is_finite_and_falls_when_the_positive_comes_closer(name: str, interests: int) -> None:
    vectors, used, positives, negatives = case(interests, dtype=torch.float32)
    vectors.requires_grad_()
    loss = losses.OBJECTIVES[name](vectors, used, positives, negatives, TAU)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()  # type: ignore[no-untyped-call]
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()
    closer = F.normalize(vectors.detach() + 2 * positives[:, None], dim=-1)
    assert losses.OBJECTIVES[name](closer, used, positives, negatives, TAU) < loss


@pytest.mark.parametrize("name", [name for name in losses.REPELS if name != "none"])
def test_every_repel_prefers_interests_that_differ(name: str) -> None:
    same = torch.ones(5, 3, 4, dtype=torch.float64) / 2
    apart = torch.eye(4, dtype=torch.float64)[:3].expand(5, 3, 4)
    margin = 1.0 if name == "distance" else 0.3
    assert losses.REPELS[name](apart, margin) < losses.REPELS[name](same, margin)


def test_repels_by_hand() -> None:
    pair = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    assert losses.repel_cosine(pair, 0.5).item() == pytest.approx(0.1)
    assert losses.repel_orthogonal(pair, 0.0).item() == pytest.approx(0.36)
    assert losses.repel_distance(pair, 1.0).item() == pytest.approx(1 - 0.8**0.5)
    assert losses.repel_none(pair, 0.0).item() == 0


@pytest.mark.parametrize("name", losses.REPELS)
def test_one_interest_cannot_be_repelled_from_itself(name: str) -> None:
    assert torch.isfinite(losses.REPELS[name](torch.ones(2, 1, 4) / 2, 0.3))


def test_content_contrast_teaches_content_only() -> None:
    content = F.normalize(torch.randn(6, 4), dim=-1).requires_grad_()
    items = F.normalize(torch.randn(6, 4), dim=-1).requires_grad_()
    losses.content_contrast(content, items, TAU).backward()  # type: ignore[no-untyped-call]
    assert content.grad is not None
    assert items.grad is None
    aligned = losses.content_contrast(items.detach(), items.detach(), TAU)
    assert aligned < losses.content_contrast(content.detach(), items.detach(), TAU)


def test_weight_loss_is_least_for_the_interest_that_owns_the_next_item() -> None:
    vectors, _, positives, _ = case()
    owner = torch.einsum("pkd,pd->pk", vectors, positives).argmax(dim=1)
    sure = F.one_hot(owner, 3).double() * 0.98 + 0.01
    assert losses.weight_loss(vectors, sure, positives) < 0.1
    assert losses.weight_loss(vectors, sure.roll(1, dims=1), positives) > 1


def test_the_content_id_contrast_of_two_items_by_hand() -> None:
    """With two items every one of the sixteen negatives is the other one."""
    content, own = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    content.requires_grad_()
    own.requires_grad_()
    found = losses.content_id_contrast(content, own, 0.5)
    # cosines of content with ID: .6 .8 / .8 .6; one positive and sixteen negatives on each side
    by_hand = math.log(1 + 16 * math.exp((0.8 - 0.6) / 0.5))
    assert found.item() == pytest.approx(by_hand, rel=1e-5)
    found.backward()
    assert content.grad is not None
    assert own.grad is not None
    assert content.grad.any()
    assert own.grad.any()
    assert losses.content_id_contrast(content[:1], own[:1], 0.5).item() == 0

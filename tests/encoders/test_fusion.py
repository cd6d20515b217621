"""Fusions: what a missing modality may do (nothing), and what gradients reach."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from encoders.config import TowersConfig
from encoders.towers.fusion import FUSIONS

WIDTH, MODALITIES, ITEMS = 8, 3, 4
CONFIG = TowersConfig(content_width=WIDTH, modalities=(("a", 5), ("b", 5), ("c", 5)))


def fusion_of(name: str) -> nn.Module:
    """The fusion with weights of a trained one: nothing that starts at zero stays there."""
    torch.manual_seed(0)
    fusion = FUSIONS[name](CONFIG).eval()
    for weights in fusion.parameters():
        nn.init.normal_(weights, std=0.5)
    return fusion


def masks() -> st.SearchStrategy[torch.Tensor]:
    row = st.lists(st.booleans(), min_size=MODALITIES, max_size=MODALITIES)
    return st.lists(row, min_size=ITEMS, max_size=ITEMS).map(torch.tensor)


@pytest.mark.parametrize("name", FUSIONS)
@settings(max_examples=25, deadline=None)
@given(present=masks(), noise=st.sampled_from([0.0, 1.0, -1e4, 1e30, math.inf, math.nan]), seed=st.integers(0, 99))
def test_what_stands_in_the_place_of_a_missing_modality_never_counts(
    name: str, present: torch.Tensor, noise: float, seed: int
) -> None:
    parts = torch.randn(ITEMS, MODALITIES, WIDTH, generator=torch.Generator().manual_seed(seed))
    fusion = fusion_of(name)
    absent = fusion(torch.where(present[..., None], parts, 0.0), present)
    masked = fusion(torch.where(present[..., None], parts, noise), present)
    assert absent.shape == (ITEMS, WIDTH)
    assert absent.isfinite().all()
    torch.testing.assert_close(masked, absent)


@pytest.mark.parametrize("name", FUSIONS)
def test_every_weight_and_every_present_modality_is_taught(name: str) -> None:
    fusion, present = fusion_of(name), torch.tensor([[True, True, True], [True, False, True]])
    parts = torch.randn(2, MODALITIES, WIDTH, requires_grad=True)
    fusion(parts, present).square().sum().backward()
    assert all(weights.grad is not None and weights.grad.any() for weights in fusion.parameters())
    assert parts.grad is not None
    assert parts.grad.any(dim=2).tolist() == present.tolist()


def test_the_q_former_reads_its_queries_out_side_by_side() -> None:
    one, four = (FUSIONS["qformer"](TowersConfig(content_width=WIDTH, fusion_queries=q, modalities=CONFIG.modalities))
                 for q in (1, 4))  # fmt: skip
    assert isinstance(four.project, nn.Linear)
    assert isinstance(one.project, nn.Linear)
    assert (one.project.in_features, four.project.in_features) == (WIDTH, 4 * WIDTH)

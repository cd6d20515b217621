"""A loss, a fusion and an interest extractor are one entry in their dict: trained by name, and read back."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.config import TowersConfig, TrainConfig, changed, config_from_json
from encoders.towers import fusion, interests, losses
from encoders.training import checkpoint
from encoders.training.checks import check_names
from encoders.training.train import train
from polytower.errors import UserError
from tests.encoders.data import tiny_catalogue, tiny_histories

TINY = TrainConfig(
    towers=TowersConfig(dim=16, history=8, interests=2, content_width=8),
    epochs=1,
    batch_rows=4,
    negatives=0,
    threads=1,
    device="cpu",
)


class Sum(nn.Module):
    """A fusion: the sum over the modalities present, each by a weight of its own."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(config.modalities)))

    def forward(self, parts_NMH: Tensor, present_NM: Tensor) -> Tensor:
        return (parts_NMH * (self.weight * present_NM)[..., None]).sum(dim=1)


class Shifted(nn.Module):
    """An extractor: the state, shifted by a vector of each interest's own."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(config.interests, config.dim) * 0.1)

    def forward(self, query_BQD: Tensor, states_BTD: Tensor, allowed_BQT: Tensor) -> Tensor:
        return query_BQD.unsqueeze(2) + self.shift


def pairwise(
    interests_PKD: Tensor, used_PK: Tensor, positives_PD: Tensor, negatives: losses.Negatives, tau: float
) -> Tensor:
    """A loss: BPR on the best interest of each item."""
    positive_P = torch.einsum("pkd,pd->pk", interests_PKD, positives_PD).masked_fill(~used_PK, -1.0).amax(dim=1)
    scores_PKN = torch.einsum("pkd,nd->pkn", interests_PKD, negatives.vectors)
    negative_PN = scores_PKN.masked_fill(~used_PK[..., None], -1.0).amax(dim=1)
    return -F.logsigmoid((positive_P[:, None] - negative_PN) / tau).mean()


def repel_norms(interests_PKD: Tensor, margin: float) -> Tensor:
    """A repel: the length of the interests' mean, beyond the margin."""
    return F.relu(interests_PKD.mean(dim=1).norm(dim=-1) - margin).mean()


# option -> (registry, toy)
TOYS = {
    "objective": (losses.OBJECTIVES, pairwise),
    "repel": (losses.REPELS, repel_norms),
    "towers.fusion": (fusion.FUSIONS, Sum),
    "towers.extractor": (interests.EXTRACTORS, Shifted),
}


@pytest.mark.parametrize("option", TOYS)
def test_an_entry_in_the_dict_is_all_that_it_takes(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, toy = TOYS[option]
    config = changed(replace(TINY, repel_weight=0.1), {option: "toy"})
    with pytest.raises(UserError, match=r"no .* 'toy'; there are "):
        check_names(config)
    monkeypatch.setitem(registry, "toy", toy)  # type: ignore[arg-type]
    catalogue, histories = tiny_catalogue(), tiny_histories()
    result = train(catalogue, histories, config, directory=tmp_path)
    assert [point.epoch for point in result.curves] == [1]
    towers, kept, metrics = checkpoint.load(tmp_path, catalogue)
    assert kept == config_from_json(config.as_json())
    assert metrics == result.metrics
    for name, value in result.towers.state_dict().items():
        torch.testing.assert_close(towers.state_dict()[name], value)
    plain = train(catalogue, histories, replace(TINY, repel_weight=0.1), directory=tmp_path / "plain")
    assert plain.curves[0].loss != result.curves[0].loss  # it was the toy that was trained

"""The content path while it is trained."""

import pytest
import torch

from encoders.towers.content_tower import some_alone


def test_while_training_some_items_show_one_of_their_modalities_alone() -> None:
    torch.manual_seed(0)
    has = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
    present = dict(zip("abc", has.repeat(1000, 1).unbind(dim=1), strict=True))
    kept = torch.stack(list(some_alone(present, 0.3).values()), dim=1).view(1000, *has.shape)
    assert not (kept & ~has).any()
    assert kept.any(dim=2).all(dim=0).tolist() == [True, True, True, False]
    alone = (kept.sum(dim=2) == 1).float().mean(dim=0)
    assert alone[:2].tolist() == pytest.approx([0.3, 0.3], abs=0.05)
    each = kept[kept[:, 0].sum(dim=1) == 1, 0].float().mean(dim=0)
    assert each.tolist() == pytest.approx([1 / 3] * 3, abs=0.1)

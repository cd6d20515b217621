"""Relative positions and times, rotary positions: what they may change, and that padding and packing do not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encoders.catalogue import Catalogue, Histories
from encoders.config import TowersConfig, TrainConfig
from encoders.evaluation.evaluate import TowersScorer, context_of, padded
from encoders.towers.backbone import Recency
from encoders.towers.model import Context
from encoders.towers.positions import BUCKETS, buckets, looked_up, rotated
from encoders.towers.towers import UserTower
from encoders.training import checkpoint
from encoders.training.packing import batches, pack
from encoders.training.train import train
from tests.encoders.data import ITEMS, tiny_catalogue, tiny_histories

SHAPE = TowersConfig(dim=16, history=8, dropout=0.0, interests=2, relative="both")
DAY = 86_400_000_000


def tower_of(**changes: object) -> UserTower:
    torch.manual_seed(0)
    tower = UserTower(replace(SHAPE, **changes))  # type: ignore[arg-type]
    for parameter in tower.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return tower.eval()


def vectors(length: int) -> torch.Tensor:
    return F.normalize(torch.randn(1, length, SHAPE.dim, generator=torch.Generator().manual_seed(1)), dim=-1)


def spread(histories: Histories) -> Histories:
    """The same events, a random number of seconds to months apart."""
    gaps = 10.0 ** np.random.default_rng(0).uniform(6, 13, len(histories.items))
    return Histories(histories.user_ids, histories.offsets, histories.items, gaps.astype(np.int64).cumsum())


def test_buckets_by_hand() -> None:
    found = buckets(torch.tensor([-5.0, 0, 1, 2, 3, 4, 86_400, 1e30]))
    assert found.tolist() == [0, 0, 2, 3, 4, 5, 37, BUCKETS - 1]


def test_the_gradient_of_a_look_up_is_torchs_own() -> None:
    table = torch.randn(2, BUCKETS, dtype=torch.float64, requires_grad=True)
    places, weights = torch.randint(BUCKETS, (3, 4, 5)), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    (own,) = torch.autograd.grad((looked_up(table, places) * weights).sum(), table)
    plain = table[:, places].transpose(0, 1)
    torch.testing.assert_close(looked_up(table, places), plain)
    torch.testing.assert_close(own, torch.autograd.grad((plain * weights).sum(), table)[0])


def test_rotary_products_depend_on_the_distance_alone() -> None:
    one, two = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    near, far = (
        (rotated(one, torch.tensor([[start]])) * rotated(two, torch.tensor([[start + 3]]))).sum() for start in (0, 9)
    )
    torch.testing.assert_close(near, far)
    torch.testing.assert_close(rotated(one, torch.tensor([[5]])).norm(), one.norm())


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(
    "options", [{"relative": "both"}, {"relative": "position"}, {"positions": "rotary"}, {"recency": True}], ids=str
)
def test_packing_and_padding_change_nothing(options: dict[str, Any], blocks: int) -> None:
    tower, items = tower_of(blocks=blocks, **options), vectors(7)
    times = torch.tensor([[5, 9, 9, 40, 2, 700, 900]]) * DAY
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2]])
    allowed = torch.ones(7, 7, dtype=torch.bool).tril() & (segments[:, :, None] == segments[:, None])
    packed = tower(items, torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), allowed, context=Context(times))
    wide, mask, when = torch.full((1, 9, 16), 7.0), torch.zeros(1, 9, dtype=torch.bool), torch.zeros(1, 9).long()
    for part, last, spots in ((slice(0, 4), 3, [0, 3, 4, 8]), (slice(4, 7), 6, [1, 2, 6])):
        wide[:, spots], mask[:], when[:, spots] = items[:, part], False, times[:, part]
        mask[:, spots] = True
        found = tower.interests(wide, mask, Context(when))
        torch.testing.assert_close(found.vectors, packed.vectors[:, last])


def test_recency_weighs_the_newest_items_as_item_knn_does() -> None:
    items, allowed = vectors(4), torch.tensor([[[True, True, False, True]]])
    places = torch.tensor([[3]]), torch.arange(4)[None]
    found = Recency(TowersConfig(dim=items.shape[-1]))(items, places, allowed)
    expected = 0.8**3 * items[:, 0] + 0.8**2 * items[:, 1] + items[:, 3]
    torch.testing.assert_close(found[:, 0], expected)


def test_only_differences_of_time_count_and_only_where_they_are_read() -> None:
    items, mask = vectors(5), torch.ones(1, 5, dtype=torch.bool)
    times = torch.tensor([[1, 2, 30, 31, 400]]) * DAY
    tower, blind = tower_of(), tower_of(relative="position")
    found = tower.interests(items, mask, Context(times)).vectors
    torch.testing.assert_close(tower.interests(items, mask, Context(times + 1_000 * DAY)).vectors, found)
    assert not torch.allclose(tower.interests(items, mask, Context(times * 50)).vectors, found, atol=1e-4)
    assert torch.isfinite(tower.interests(items, mask).vectors).all()
    assert torch.equal(blind.interests(items, mask, Context(times)).vectors, blind.interests(items, mask).vectors)


def test_rows_and_questions_carry_the_times_of_their_events() -> None:
    histories = spread(tiny_histories(users=6))
    at = {(int(item), int(time)) for item, time in zip(histories.items, histories.times, strict=True)}
    rows = pack(histories, 5, np.random.default_rng(0))
    valid = rows.segments > 0
    assert set(zip(rows.inputs[valid].tolist(), rows.times[valid].tolist(), strict=True)) <= at
    (batch,) = batches(rows, len(rows), torch.device("cpu"))
    assert batch.context.times is not None
    assert torch.equal(batch.context.times, torch.from_numpy(rows.times))
    inputs, mask = padded(histories, 4)
    times = context_of(histories, replace(SHAPE, history=4)).times
    assert times is not None
    asked = zip(inputs[mask].tolist(), times[mask].tolist(), strict=True)
    assert set(asked) <= at


@pytest.mark.parametrize(
    "options", [{"relative": "both"}, {"relative": "time"}, {"positions": "rotary"}, {"recency": True}], ids=str
)
def test_it_trains_and_serves_from_its_bytes(tmp_path: Path, options: dict[str, Any]) -> None:
    catalogue: Catalogue = tiny_catalogue(content=False)
    histories = spread(tiny_histories(users=60))
    shape = replace(SHAPE, **{"relative": "none", **options})
    config = TrainConfig(towers=shape, epochs=4, batch_rows=4, negatives=0, threads=1, device="cpu", learning_rate=1e-2)
    result = train(catalogue, histories, config, directory=tmp_path)
    assert result.curves[-1].loss < result.curves[0].loss
    relative = result.towers.user_tower.backbone.relative
    if relative is not None and relative.time is not None:
        assert relative.time.abs().sum() > 0
    scorer = TowersScorer(result.towers)
    served = checkpoint.load_user_tower(*checkpoint.user_tower_bytes(result.towers))
    inputs, mask = padded(histories, 8)
    found = served.interests(scorer.items_VD[inputs], mask, context_of(histories, served.config))
    torch.testing.assert_close(found.vectors, scorer.interests(histories).vectors)
    assert scorer(histories).shape == (60, ITEMS)

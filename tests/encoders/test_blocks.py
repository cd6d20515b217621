"""Items in two blocks, cold ones placed by a ridge: what the vectors are made of, and that training holds to it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.catalogue import Catalogue
from encoders.closed_form import ridge, whitening
from encoders.config import TowersConfig, TrainConfig, changed
from encoders.evaluation.splits import production
from encoders.experiments.experiment import make_split
from encoders.towers.fusion import FUSIONS
from encoders.towers.towers import Towers
from encoders.training import checkpoint
from encoders.training.cold import UNTUNED
from encoders.training.start import initial_towers
from encoders.training.train import train
from polytower.errors import UserError
from tests.encoders.data import ITEMS, tiny_catalogue, tiny_histories

SHAPE = TowersConfig(
    dim=24, heads=2, history=8, dropout=0.1, interests=1, content_width=8, content_dim=8, fusion="none", linear=True,
    whiten=6, cold="ridge",
)  # fmt: skip
CONFIG = TrainConfig(towers=SHAPE, negatives=0, batch_rows=4, epochs=2, validate_every=1, content_weight=0, threads=1)


def towers_of(catalogue: Catalogue, **changes: object) -> Towers:
    shape = replace(SHAPE, modalities=catalogue.modalities, **changes)  # type: ignore[arg-type]
    return initial_towers(catalogue, tiny_histories(), replace(CONFIG, towers=shape)).eval()


def test_an_item_is_the_roots_of_a_share_of_id_and_of_content() -> None:
    towers = towers_of(tiny_catalogue(), id_share=0.3)
    found = towers.item_embeddings()
    both = found.has_id & found.has_content
    assert both.any()
    torch.testing.assert_close(found.item[both], (0.3**0.5 * found.id + 0.7**0.5 * found.content)[both])
    id_dim = towers.config.id_dim
    assert id_dim == 24 - 8 - 1
    assert (found.id[:, id_dim:] == 0).all()
    assert (found.content[:, :id_dim] == 0).all()
    assert (found.content[:, -1] == 0).all()
    torch.testing.assert_close(found.item.norm(dim=1), (found.has_id | found.has_content).float())


def test_rare_items_lean_on_content_with_shrinkage_and_the_share_can_be_learned() -> None:
    towers = towers_of(tiny_catalogue(), shrinkage=2.0, learn_id_share=True)
    tower, items = towers.item_tower, torch.arange(ITEMS)
    tower.counts.copy_(torch.arange(float(ITEMS)))
    id_N, content_N = tower.weights(items, tower.counts > 0)
    torch.testing.assert_close(id_N**2 + content_N**2, torch.ones(ITEMS))
    assert id_N[0] == 0
    assert (id_N[1:].diff() > 0).all()
    assert id_N[2].item() ** 2 == pytest.approx(0.5 * 2 / 4)
    id_N.sum().backward()
    assert tower.id_logit is not None
    assert tower.id_logit.grad is not None
    assert tower.id_logit.grad.isfinite()
    assert tower.id_logit.grad != 0


@pytest.mark.parametrize("content_dim", [0, 8])
@settings(max_examples=20, deadline=None)
@given(kappa=st.floats(0, 1), seed=st.integers(0, 50))
def test_doubt_scales_what_a_cold_item_scores_by_id_and_nothing_else(content_dim: int, kappa: float, seed: int) -> None:
    """Unit vectors whatever κ is; inner products with interests as if the foretold ID were κ of its length."""
    towers = towers_of(tiny_catalogue(), content_dim=content_dim)
    tower = towers.item_tower
    tower.counts[:6] = 0
    tower.ridge.normal_(generator=torch.Generator().manual_seed(seed))
    tower.kappa.fill_(1.0)
    full = towers.item_embeddings()
    tower.kappa.fill_(kappa)
    found = towers.item_embeddings()
    history = full.item[None, 6:10]
    interest = towers.user_interests(history, torch.ones(1, 4, dtype=torch.bool)).vectors[0, 0]
    assert interest[-1] == 0
    cold = ~full.has_id & full.has_content
    assert cold[:6].any()
    torch.testing.assert_close(found.item[full.has_id], full.item[full.has_id])
    torch.testing.assert_close(found.item.norm(dim=1), full.item.norm(dim=1))
    by_id, by_content = (full.item * (1 - block) @ interest for block in _content_block(towers))
    torch.testing.assert_close((found.item @ interest)[cold], (kappa * by_id + by_content)[cold], atol=1e-5, rtol=1e-4)


def _content_block(towers: Towers) -> tuple[torch.Tensor, torch.Tensor]:
    block = torch.zeros(towers.config.dim)
    if towers.config.content_dim:
        block[towers.config.id_dim : -1] = 1
    return block, 1 - block


def test_what_a_cold_item_holds_in_a_history_is_read_without_its_doubt() -> None:
    towers = towers_of(tiny_catalogue())
    items = towers.item_embeddings().item[None, :5]
    doubtful = items.clone()
    doubtful[..., -1] = 0.7
    every = torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(
        towers.user_interests(doubtful, every).vectors, towers.user_interests(items, every).vectors
    )


@pytest.mark.parametrize("fusion", ["none", *FUSIONS])
def test_blocks_train_with_every_fusion_and_are_read_back_the_same(tmp_path: Path, fusion: str) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    config = changed(CONFIG, {"towers.fusion": fusion, "towers.id_dropout": 0.2, "towers.learn_id_share": True})
    result = train(catalogue, histories, config, directory=tmp_path)
    assert {"kappa", "cold_recall@50", "warm_loss"} <= set(result.metrics)
    before = initial_towers(
        catalogue, result.split.train, replace(config, towers=replace(config.towers, modalities=catalogue.modalities))
    )
    moved = dict(before.named_parameters())
    for name, value in result.towers.named_parameters():
        if name.startswith("item_tower.") and name != "item_tower.content.out.1.bias":
            assert not torch.equal(value, moved[name]), name
    read, _, metrics = checkpoint.load(tmp_path, catalogue)
    assert metrics == result.metrics
    assert float(read.item_tower.kappa) == pytest.approx(metrics["kappa"])
    for one, other in zip(read.item_embeddings(), result.towers.item_embeddings(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_new_item_stands_where_its_twin_is_foretold(tmp_path: Path) -> None:
    """Between trainings: another catalogue, the same ridge."""
    catalogue, histories = tiny_catalogue(), tiny_histories()
    result = train(catalogue, histories, replace(CONFIG, kappa=0.8), directory=tmp_path)
    order = np.array([4, 2, 0, 9])
    later = Catalogue(
        [*(catalogue.item_ids[row] for row in order[:3]), "new"],
        {name: rows[order] for name, rows in catalogue.content.items()},
        {name: rows[order] for name, rows in catalogue.present.items()},
    )
    found, before = result.towers.over(catalogue.item_ids, later).item_embeddings(), result.towers.item_embeddings()
    torch.testing.assert_close(found.item[:3], before.item[order[:3]])
    assert not found.has_id[3]
    tower = result.towers.item_tower
    foretold = tower.foretold(
        {name: torch.from_numpy(catalogue.content[name][9:10]) for name in catalogue.content},
        {name: torch.from_numpy(catalogue.present[name][9:10]) for name in catalogue.content},
    )
    assert foretold.norm().item() == pytest.approx(1, abs=1e-5)
    assert foretold[0, -1].item() == pytest.approx((1 - 0.8**2) ** 0.5)
    torch.testing.assert_close(found.item[3:], 0.5**0.5 * foretold + 0.5**0.5 * before.content[9:10])


def test_kappa_costs_warm_items_no_more_than_was_allowed(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(60), tiny_histories(300, 60)
    config = replace(CONFIG, towers=replace(SHAPE, content_dim=0), epochs=8)
    split = make_split("cold_items", histories, len(catalogue))
    generous = train(catalogue, histories, replace(config, cold_loss=1.0), directory=tmp_path / "one", split=split)
    strict = train(catalogue, histories, replace(config, cold_loss=0.0), directory=tmp_path / "two", split=split)
    assert strict.metrics["warm_loss"] <= 0
    assert strict.metrics["kappa"] <= generous.metrics["kappa"]
    assert strict.metrics["cold_recall@50"] <= generous.metrics["cold_recall@50"]
    assert generous.metrics["cold_recall@50"] > 0.5


def test_refitted_towers_keep_the_kappa_of_the_strict_ones(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    config = replace(CONFIG, refit=True, cold_loss=1.0, epochs=4)
    result = train(catalogue, histories, config, directory=tmp_path / "one")
    assert float(result.towers.item_tower.kappa) == pytest.approx(result.metrics["kappa"])
    assert not torch.equal(result.towers.item_tower.ridge, result.evaluated.item_tower.ridge)
    alone = train(catalogue, histories, CONFIG, directory=tmp_path / "two", split=production(histories))
    assert alone.metrics == {"kappa": UNTUNED}


def test_towers_of_content_refuse_a_catalogue_without_any(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no item has any embedded"):
        train(tiny_catalogue(content=False), tiny_histories(), CONFIG, directory=tmp_path)


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 8), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_whitened_components_are_uncorrelated_and_of_one_variance(rank: int, width: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(40, width)).astype(np.float32) * np.arange(1, width + 1)
    present = np.arange(40) % 4 != 0
    rows[~present] = 1e6
    mean, basis = whitening(rows.astype(np.float32), present, rank)
    found = np.cov((rows[present] - mean) @ basis, rowvar=False).reshape(rank, rank)
    expected = np.diag((np.arange(rank) < width).astype(float))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_whitening_of_nothing_is_nothing() -> None:
    rows = np.ones((3, 4), np.float32)
    for present in (np.zeros(3, bool), np.ones(3, bool)):
        assert not whitening(rows, present, 2)[1].any()


def test_a_ridge_finds_the_map_and_shrinks_with_its_strength() -> None:
    rng = np.random.default_rng(0)
    content, wanted = rng.normal(size=(50, 4)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    weights = np.ones(50, np.float32)
    np.testing.assert_allclose(ridge(content, content @ wanted, weights, 1e-6), wanted, atol=1e-4)
    assert np.linalg.norm(ridge(content, content @ wanted, weights, 100)) < np.linalg.norm(wanted)

"""Big ID tables: what a step touches is all it pays for, and the result is the one that is expected."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig, TrainConfig
from encoders.evaluation.evaluate import TowersScorer, evaluate
from encoders.evaluation.splits import leave_one_out
from encoders.training import checkpoint
from encoders.training.hashed_rows import gathered, places
from encoders.training.objective import draw_negatives
from encoders.training.optimise import RowwiseAdam, RowwiseMean
from encoders.training.packing import batches, pack
from encoders.training.train import Run, train
from polytower.errors import UserError
from tests.encoders.data import ITEMS, tiny_catalogue, tiny_histories

SHAPE = TowersConfig(dim=16, history=8, dropout=0.1, interests=2, content_width=16)
CONFIG = TrainConfig(
    towers=SHAPE,
    epochs=4,
    batch_rows=4,
    negatives=8,
    validate_every=1,
    threads=1,
    device="cpu",
    table_optimiser="rowwise",
)


def test_row_wise_adam_equals_its_definition() -> None:
    """Against a dense loop: one second moment a row that decays in every step, no first moment."""
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(6, 3, generator=generator))
    plain, second, rate = table.detach().clone().double(), torch.zeros(6).double(), 0.1
    optimiser = RowwiseAdam(table)
    for step in range(1, 8):
        rows = torch.randperm(6, generator=generator)[:2]
        gradient = torch.zeros(6, 3, dtype=torch.float64)
        gradient[rows] = torch.randn(2, 3, generator=generator).double()
        table.grad = gradient.float().to_sparse(1)
        optimiser.step(rate)
        second = 0.999 * second + 0.001 * gradient.square().mean(dim=1)
        plain -= rate * gradient / ((second / (1 - 0.999**step)).sqrt() + 1e-8)[:, None]
    assert table.grad is None
    torch.testing.assert_close(table.detach().double(), plain, rtol=1e-4, atol=1e-5)


def test_the_lazy_mean_is_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(5, 2, generator=generator))
    lazy, plain = RowwiseMean(table), table.detach().clone()
    for step in range(20):
        rows = torch.randperm(5, generator=generator)[: step % 3]
        lazy.before(rows)
        table.data[rows] += torch.randn(len(rows), 2, generator=generator)
        decay = min(0.9, (1 + step) / (10 + step))
        lazy.after(decay)
        plain.lerp_(table.detach(), 1 - decay)
    torch.testing.assert_close(lazy.whole(), plain)
    torch.testing.assert_close(lazy.whole(), plain)  # asking twice changes nothing


def test_only_the_rows_of_a_step_change_and_training_learns_like_the_dense_one(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(content=False), tiny_histories(users=100)
    found = {}
    for name in ("dense", "rowwise"):
        config = replace(CONFIG, table_optimiser=name, epochs=8, learning_rate=1e-2, negatives=0)
        result = train(catalogue, histories, config, directory=tmp_path / name)
        found[name] = evaluate(TowersScorer(result.towers), result.split.test, ITEMS)["masked"]["ndcg@10"]
    assert found["rowwise"] > 0.8 * found["dense"] > 0.2
    run = Run(catalogue, leave_one_out(histories), CONFIG, tmp_path / "step")
    before = run.towers.item_tower.table.detach().clone()
    batch = next(batches(pack(histories, 8, np.random.default_rng(0)), 4, torch.device("cpu")))
    torch.manual_seed(1)
    run.step(batch, 1e-2, "")
    torch.manual_seed(1)
    drawn, _ = draw_negatives(CONFIG, run.warm, run.frequency, batch.targets)
    touched = torch.unique(torch.cat([batch.inputs.flatten(), batch.targets, drawn]))
    changed = torch.nonzero((run.towers.item_tower.table.detach() != before).any(dim=1)).squeeze(1)
    assert set(changed.tolist()) <= set(touched.tolist())
    assert len(changed) > 0.8 * len(touched)


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.0}, {"towers": replace(SHAPE, tail_buckets=6, shrinkage=1.0)}], ids=str
)
def test_an_interrupted_row_wise_run_ends_like_an_uninterrupted_one(tmp_path: Path, changes: dict[str, object]) -> None:
    class Killed(BaseException):
        pass

    def kill(point: object) -> None:
        if getattr(point, "epoch", 0) == 2:
            raise Killed

    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    whole = train(tiny_catalogue(), tiny_histories(), config, directory=tmp_path / "whole")
    with pytest.raises(Killed):
        train(tiny_catalogue(), tiny_histories(), config, directory=tmp_path / "cut", on_epoch=kill)
    resumed = train(tiny_catalogue(), tiny_histories(), config, directory=tmp_path / "cut")
    assert [point.loss for point in resumed.curves] == [point.loss for point in whole.curves]
    for name, value in whole.towers.state_dict().items():
        torch.testing.assert_close(resumed.towers.state_dict()[name], value, rtol=0, atol=0)


def test_places_give_frequent_items_a_row_and_rare_ones_two_that_few_share() -> None:
    counts = np.random.default_rng(0).geometric(0.3, 5000) - 1
    found = places(counts, 400, below=3)
    own = counts >= 3
    assert found[own, 0].tolist() == list(range(own.sum()))
    assert (found[own, 0] == found[own, 1]).all()
    tail = found[~own]
    assert (tail[:, 0] != tail[:, 1]).all()
    assert own.sum() <= tail.min() < tail.max() < own.sum() + 400
    loads = np.bincount(tail.ravel() - own.sum(), minlength=400)
    assert loads.max() < 2 * loads.mean()
    assert len(np.unique(np.sort(tail, axis=1), axis=0)) > 0.9 * len(tail)


def test_a_gathered_table_keeps_the_vectors_of_items_with_their_own_row() -> None:
    counts = np.array([9, 0, 9, 1, 1])
    vectors = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    taken = places(counts, 2, below=2)
    table = gathered(vectors, taken, 4)
    np.testing.assert_allclose(table[:2], vectors[[0, 2]])
    np.testing.assert_allclose(table[2:], np.repeat(vectors[[1, 3, 4]].mean(axis=0)[None] / 2, 2, axis=0), rtol=1e-6)


def test_rare_items_share_rows_from_training_to_the_checkpoint(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(content=False), tiny_histories(users=100)
    shape = replace(SHAPE, tail_buckets=5, tail_below=25)
    result = train(
        catalogue, histories, replace(CONFIG, towers=shape, epochs=8, learning_rate=1e-2), directory=tmp_path
    )
    own = int((result.towers.item_tower.counts >= 25).sum())
    assert 0 < own < ITEMS
    assert result.towers.item_tower.table.shape == (own + 5, 16)
    found = result.towers.item_embeddings()
    loaded, _, _ = checkpoint.load(tmp_path, catalogue)
    torch.testing.assert_close(loaded.item_embeddings().item, found.item)
    order = [4, 2, 9]
    smaller = Catalogue([*(catalogue.item_ids[row] for row in order), "new"])
    moved = result.towers.over(catalogue.item_ids, smaller).item_embeddings()
    torch.testing.assert_close(moved.item[:3], found.item[order])
    assert not moved.has_id[3]
    with pytest.raises(UserError, match="rare items share rows"):
        train(catalogue, histories, CONFIG, directory=tmp_path / "on", start=(result.towers, catalogue.item_ids))


def test_negatives_of_a_huge_catalogue_are_distinct_and_drawn_without_a_permutation() -> None:
    warm = torch.arange(2_000_000)
    config = replace(CONFIG, negatives=1000, logq=True)
    frequency = torch.full((len(warm),), 1 / len(warm))
    drawn, bias = draw_negatives(config, warm, frequency, warm[:1])
    assert len(set(drawn.tolist())) == 1000
    assert bias.exp().sum().item() == pytest.approx(len(warm), rel=1e-4)
    assert drawn.float().mean().item() == pytest.approx(1e6, rel=0.1)

"""The training loop learns, resumes to the same weights, reaches every part, and stops in words when it must."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig, TrainConfig, config_from_json
from encoders.evaluation.baselines import Popularity
from encoders.evaluation.evaluate import TowersScorer, evaluate, padded
from encoders.evaluation.splits import leave_one_out, production
from encoders.towers.interests import EXTRACTORS
from encoders.towers.losses import OBJECTIVES, attention_variance
from encoders.training import checkpoint
from encoders.training.objective import batch_loss, draw_negatives
from encoders.training.packing import batches, pack
from encoders.training.start import initial_towers
from encoders.training.train import Epoch, train
from polytower.errors import UserError
from tests.encoders.data import ITEMS, histories_of, tiny_catalogue, tiny_histories

SHAPE = TowersConfig(dim=16, history=8, dropout=0.1, interests=2, content_width=16, shrinkage=1.0)
CONFIG = TrainConfig(towers=SHAPE, epochs=4, batch_rows=4, negatives=0, validate_every=1, threads=1, device="cpu")


class Killed(BaseException):
    """The process dies here."""


def kill_after(epoch: int) -> Callable[[Epoch], None]:
    def on_epoch(point: Epoch) -> None:
        if point.epoch == epoch:
            raise Killed

    return on_epoch


def losses_of(curves: list[Epoch]) -> list[float]:
    return [point.loss for point in curves]


def test_training_beats_popularity_and_the_loss_falls(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories(users=100)
    config = replace(CONFIG, epochs=8, learning_rate=1e-2, validate_every=4)
    result = train(catalogue, histories, config, directory=tmp_path)
    assert losses_of(result.curves)[-1] < 0.7 * losses_of(result.curves)[0]
    found = evaluate(TowersScorer(result.towers), result.split.test, ITEMS)
    popular = evaluate(Popularity(result.split.train, ITEMS), result.split.test, ITEMS)
    assert found["masked"]["ndcg@10"] > 2 * popular["masked"]["ndcg@10"]
    assert result.metrics["ndcg@10"] == max(point.ndcg_10 or 0 for point in result.curves)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    whole = train(catalogue, histories, CONFIG, directory=tmp_path / "whole")
    with pytest.raises(Killed):
        train(catalogue, histories, CONFIG, directory=tmp_path / "cut", on_epoch=kill_after(2))
    torch.randn(17)  # the state of torch's own generator must not matter
    resumed = train(catalogue, histories, CONFIG, directory=tmp_path / "cut")
    assert losses_of(resumed.curves) == losses_of(whole.curves)
    for name, value in whole.towers.state_dict().items():
        torch.testing.assert_close(resumed.towers.state_dict()[name], value, rtol=0, atol=0)


def test_an_unfinished_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    with pytest.raises(Killed):
        train(catalogue, histories, CONFIG, directory=tmp_path, on_epoch=kill_after(1))
    with pytest.raises(UserError, match="another configuration"):
        train(catalogue, histories, replace(CONFIG, temperature=0.2), directory=tmp_path)
    with pytest.raises(UserError, match="other data"):
        train(catalogue, tiny_histories(seed=5), CONFIG, directory=tmp_path)
    anew = train(catalogue, histories, replace(CONFIG, temperature=0.2), directory=tmp_path, resume=False)
    assert len(anew.curves) == CONFIG.epochs


def test_a_run_that_an_earlier_version_began_is_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tiny_catalogue(), tiny_histories(), CONFIG, directory=tmp_path, on_epoch=kill_after(2))
    state = tmp_path / "state.safetensors"
    document = checkpoint.read_document(state)
    assert document is not None
    del document["config"]["towers"]["relative"], document["config"]["logq"]
    checkpoint.write_tensors(state, checkpoint.read_tensors(state), document)
    epochs: list[int] = []
    train(
        tiny_catalogue(),
        tiny_histories(),
        CONFIG,
        directory=tmp_path,
        on_epoch=lambda point: epochs.append(point.epoch),
    )
    assert epochs == [3, 4]


def test_training_leaves_the_callers_randomness_and_threads_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    train(tiny_catalogue(), tiny_histories(), replace(CONFIG, epochs=1), directory=tmp_path)
    torch.testing.assert_close(torch.rand(4), expected)
    assert torch.get_num_threads() == threads


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    runs = [
        train(catalogue, histories, replace(CONFIG, epochs=1, seed=seed), directory=tmp_path / str(run))
        for run, seed in enumerate((1, 1, 2))
    ]
    assert losses_of(runs[0].curves) == losses_of(runs[1].curves) != losses_of(runs[2].curves)


def test_it_stops_when_validation_does_not_get_better(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=50, learning_rate=1e-9, patience=2)
    result = train(tiny_catalogue(), tiny_histories(), config, directory=tmp_path)
    assert len(result.curves) < 50
    assert len(result.curves) == result.best_epoch + 2


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_reach_every_trainable_part(extractor: str, objective: str) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    shape = replace(
        SHAPE, extractor=extractor, modalities=catalogue.modalities, residual="gated", feed_forward="swiglu"
    )
    config = replace(CONFIG, towers=shape, objective=objective, negatives=10, repel="cosine", repel_weight=0.1)
    towers = initial_towers(catalogue, histories, config)
    for parameter in towers.parameters():  # off the zeros that some parts start at
        parameter.data += 0.01 * torch.randn_like(parameter)
    rows = pack(histories, shape.history, np.random.default_rng(0))
    batch = next(batches(rows, len(rows), torch.device("cpu")))
    warm = torch.nonzero(towers.item_tower.counts).squeeze(1)
    _, loss = batch_loss(towers, batch, config, warm, torch.full((len(warm),), 1 / len(warm)))
    loss.backward()  # type: ignore[no-untyped-call]
    dead = [name for name, value in towers.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert dead == []


@pytest.mark.parametrize(
    "changes",
    [
        {"negatives": 8},
        {"negatives": 8, "sampling": "popularity", "logq": True},
        {"negatives": 8, "sampling": "in_batch", "logq": True},
        {"negatives": 8, "sampling": "mixed", "logq": True},
        {"towers": replace(SHAPE, extractor="comirec_sa"), "objective": "remi", "routing_weight": 100.0},
        {"initial": "normal"},
        {"smooth_initial": 5.0},
        {"towers": replace(SHAPE, interests=1, shrinkage=0.0)},
        {"towers": replace(SHAPE, adaptive=True, interests=4)},
        {"towers": replace(SHAPE, blocks=2, fusion="qformer")},
        {"windows": (1, 4), "window_targets": 3},
        {"windows": (3,), "objective": "soft_consistent", "negatives": 8},
    ],
    ids=str,
)
def test_every_option_trains(tmp_path: Path, changes: dict[str, object]) -> None:
    config = replace(CONFIG, epochs=3, **changes)  # type: ignore[arg-type]
    result = train(tiny_catalogue(), tiny_histories(), config, directory=tmp_path)
    assert losses_of(result.curves)[-1] < losses_of(result.curves)[0]


def test_sampled_negatives_are_distinct_and_logq_corrects_their_number() -> None:
    warm = torch.arange(10, 20)
    config = replace(CONFIG, negatives=4, logq=True)
    drawn, bias = draw_negatives(config, warm, torch.full((10,), 0.1), warm[:3])
    assert len(set(drawn.tolist())) == 4
    assert set(drawn.tolist()) <= set(warm.tolist())
    torch.testing.assert_close(bias.exp().sum(), torch.tensor(10.0))


@pytest.mark.parametrize("sampling", ["in_batch", "mixed"])
def test_in_batch_negatives_are_distinct_next_items_and_logq_makes_them_unbiased(sampling: Any) -> None:
    """Over many steps the corrected sum over the drawn is the sum over the catalogue."""
    warm, frequency = torch.arange(5, 25), torch.arange(1.0, 21).div(210)
    config = replace(CONFIG, negatives=10, sampling=sampling, logq=True)
    values, sums = torch.linspace(1, 3, 30), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(600):
            targets = warm[torch.multinomial(frequency, 8, replacement=True)]
            drawn, bias = draw_negatives(config, warm, frequency, targets)
            assert len(set(drawn.tolist())) == len(drawn) <= 10
            assert sampling == "mixed" or set(drawn.tolist()) <= set(targets.tolist())
            sums.append((bias.exp() * values[drawn]).sum())
    assert torch.stack(sums).mean().item() == pytest.approx(values[warm].sum().item(), rel=0.05)


def test_the_routing_regulariser_spreads_the_attention(tmp_path: Path) -> None:
    shape = replace(SHAPE, extractor="comirec_sa", dropout=0.0)
    histories = tiny_histories()
    spreads = []
    for weight in (0.0, 1000.0):
        config = replace(CONFIG, towers=shape, routing_weight=weight, learning_rate=2e-2)
        towers = train(tiny_catalogue(), histories, config, directory=tmp_path / str(weight)).towers
        inputs, mask = padded(histories, 8)
        attention = towers.user_interests(towers.item_embeddings().item[inputs], mask).attention
        assert attention is not None
        spreads.append(attention_variance(attention, 16).item())
    assert spreads[1] < 0.5 * spreads[0]


def test_a_loss_that_is_no_number_names_the_batch_and_keeps_the_state(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    with pytest.raises(Killed):
        train(catalogue, histories, CONFIG, directory=tmp_path, on_epoch=kill_after(1))
    kept = (tmp_path / "state.safetensors").read_bytes()
    broken = {name: rows.copy() for name, rows in catalogue.content.items()}
    broken["text"][:] = np.nan
    with pytest.raises(UserError, match=r"loss is nan at epoch 2, batch 1 of .* \(users u"):
        train(Catalogue(catalogue.item_ids, broken, catalogue.present), histories, CONFIG, directory=tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == kept


@pytest.mark.parametrize("sequences", [{}, {"a": [1]}, {"a": [1, 2, 3]}, {"a": [1], "b": [2]}])
def test_too_little_data_is_said(tmp_path: Path, sequences: dict[str, list[int]]) -> None:
    with pytest.raises(UserError, match="two interactions"):
        train(tiny_catalogue(), histories_of(sequences), CONFIG, directory=tmp_path)


@pytest.mark.parametrize(
    "sequences",
    [{"a": [1, 2, 3, 4]}, {"a": [1, 1, 1, 1, 1]}, {"a": [1, 2], "b": [5]}, {"a": [1, 2, 3, 28], "b": [1, 2, 4, 27]}],
    ids=["one", "same", "no-questions", "items-only-in-test"],
)
def test_the_least_data_trains(tmp_path: Path, sequences: dict[str, list[int]]) -> None:
    result = train(tiny_catalogue(), histories_of(sequences), CONFIG, directory=tmp_path)
    assert torch.isfinite(result.towers.item_embeddings().item).all()
    assert all(np.isfinite(losses_of(result.curves)))


def test_more_interests_than_events_and_histories_beyond_the_maximum(tmp_path: Path) -> None:
    histories = histories_of({"long": [item % 20 for item in range(500)], "short": [1, 2, 3, 4]})
    config = replace(CONFIG, towers=replace(SHAPE, interests=6), epochs=1)
    result = train(tiny_catalogue(), histories, config, directory=tmp_path)
    assert result.curves[0].positions == 497 + 1


def test_refit_keeps_the_evaluated_model_apart(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    result = train(catalogue, histories, replace(CONFIG, epochs=2, refit=True), directory=tmp_path)
    counts = (result.towers.item_tower.counts, result.evaluated.item_tower.counts)
    assert counts[0].sum() == len(histories.items)
    assert counts[1].sum() == len(leave_one_out(histories).train.items)
    towers, _, metrics = checkpoint.load(tmp_path, catalogue)
    torch.testing.assert_close(towers.item_tower.counts, counts[0])
    assert metrics == result.metrics


def test_training_on_everything_needs_no_validation(tmp_path: Path) -> None:
    histories = tiny_histories()
    result = train(tiny_catalogue(), histories, CONFIG, directory=tmp_path, split=production(histories))
    assert result.metrics == {}
    assert len(result.curves) == CONFIG.epochs


def test_the_configuration_survives_json() -> None:
    config = replace(CONFIG, towers=replace(SHAPE, modalities=(("text", 12),)))
    assert config_from_json(checkpoint.as_json(config.as_json())) == config
    assert asdict(config) == config.as_json()
    with pytest.raises(UserError, match="unknown option epochz"):
        config_from_json({"epochz": 3})


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.0}, {"epochs": -1}, {"towers": replace(SHAPE, dropout=1.0)}],
    ids=["τ", "epochs", "dropout"],
)
def test_values_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"out of range for (temperature|epochs|towers\.dropout)"):
        replace(CONFIG, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["extractor", "fusion"])
def test_unknown_parts_are_refused_with_the_known_ones(tmp_path: Path, option: str) -> None:
    config = replace(CONFIG, towers=replace(SHAPE, **{option: "nosuch"}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"no {option} 'nosuch'; there are"):
        train(tiny_catalogue(), tiny_histories(), config, directory=tmp_path)


def test_windows_need_an_objective_of_several_targets(tmp_path: Path) -> None:
    config = replace(CONFIG, windows=(5,), objective="comirec")
    with pytest.raises(UserError, match="takes one target, windows draw several; consistent and soft_consistent do"):
        train(tiny_catalogue(), tiny_histories(), config, directory=tmp_path)


def test_training_goes_on_from_earlier_towers_over_a_grown_catalogue(tmp_path: Path) -> None:
    histories = tiny_histories(users=80)
    config = replace(CONFIG, epochs=6, learning_rate=1e-2, towers=replace(SHAPE, shrinkage=0.0))
    whole = tiny_catalogue(content=False)
    before = train(whole, histories, config, directory=tmp_path / "before")
    grown = Catalogue(["new", *whole.item_ids])
    moved = histories_of({user: (histories.of(row) + 1).tolist() for row, user in enumerate(histories.user_ids)})
    short = replace(config, epochs=1)
    again = train(grown, moved, short, directory=tmp_path / "again", start=(before.towers, whole.item_ids))
    anew = train(grown, moved, short, directory=tmp_path / "anew")
    assert losses_of(again.curves)[0] < 0.8 * losses_of(anew.curves)[0]
    other = replace(short, towers=replace(config.towers, dim=8))
    with pytest.raises(UserError, match="another configuration"):
        train(grown, moved, other, directory=tmp_path / "other", start=(before.towers, whole.item_ids))


def test_a_run_killed_in_the_refit_keeps_the_selection(tmp_path: Path) -> None:
    catalogue, histories = tiny_catalogue(), tiny_histories()
    config = replace(CONFIG, epochs=2, refit=True)
    whole = train(catalogue, histories, config, directory=tmp_path / "whole")
    with pytest.raises(Killed):
        train(catalogue, histories, config, directory=tmp_path / "cut", on_epoch=kill_after(2))
    again = train(catalogue, histories, config, directory=tmp_path / "cut")
    assert losses_of(again.curves) == losses_of(whole.curves)
    torch.testing.assert_close(again.towers.item_tower.table, whole.towers.item_tower.table)
    assert not list((tmp_path / "cut").rglob("state.*"))

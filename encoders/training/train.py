"""The training loop: packed users in, towers out; resumable to the same loss.

Everything random in an epoch (order of users, windows, dropout, negatives) is drawn from generators seeded with (seed,
epoch). So resuming needs the weights, the optimiser and the epoch number, and no generator state.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from encoders.catalogue import Catalogue, Histories
from encoders.config import TrainConfig, config_from_json
from encoders.device import autocast, resolve_device
from encoders.evaluation.evaluate import TowersScorer, validation_ndcg
from encoders.evaluation.splits import Split, leave_one_out, no_questions, production
from encoders.towers.adapted import Adapted, Live
from encoders.towers.content_source import Frozen
from encoders.towers.families import FAMILIES
from encoders.towers.model import Model
from encoders.towers.towers import Towers
from encoders.training import adapting, checkpoint, cold
from encoders.training.checks import check, check_content
from encoders.training.distributed import ALONE, World
from encoders.training.optimise import Optimiser
from encoders.training.recipes import AFTER_UNIT, PRETRAINING, RECIPES, SEARCH_UNIT, Recipe
from encoders.training.start import Start
from polytower.errors import UserError

_SMALL = 20_000_000  # interactions x width below which a second thread costs more than it brings


@dataclass(frozen=True)
class Epoch:
    """One point of the curves. loss: mean per position; ndcg@10 and recall@50: validation, masked, None if not due."""

    epoch: int
    loss: float
    seconds: float
    positions: int
    ndcg_10: float | None = None
    recall_50: float | None = None


@dataclass(frozen=True, eq=False)
class TrainResult:
    """towers: the best ones, in evaluation mode on the CPU (refitted on all events if the configuration says so).

    curves: one point per epoch; best_epoch: the one kept (counted from 1); metrics: its validation metrics;
    split: what was trained on, for an honest evaluation of `evaluated`, the model before any refit.
    """

    towers: Model
    evaluated: Model
    config: TrainConfig
    split: Split
    curves: list[Epoch]
    best_epoch: int
    metrics: dict[str, float]
    seconds: float


def train(
    catalogue: Catalogue,
    histories: Histories,
    config: TrainConfig,
    *,
    directory: Path,
    progress: bool = False,
    resume: bool = True,
    on_epoch: Callable[[Epoch], None] | None = None,
    split: Split | None = None,
    start: Start | None = None,
    world: World = ALONE,
    live: Mapping[str, Live] | None = None,
) -> TrainResult:
    """Trains towers on the training part of `split` (default: strict leave-one-out), selects on its validation part.

    directory: receives the checkpoint and the state to resume from. resume=False starts anew; with True an unfinished
    run of another configuration or other data is refused. start: towers to go on from (incremental training): items
    they know keep what was learned, new ones start as ever. world: the processes that train together (`distributed`);
    all have the same arguments, rank 0 writes. live: the encoders that lora_rank trains too. Raises UserError for that,
    for data without any pair of events and for a loss that is not a number (the last good state stays).
    """
    started = time.perf_counter()
    split = split or leave_one_out(histories, search=config.search)
    check(config, split.train, starts=start is not None)
    if start is not None and not FAMILIES[config.towers.family].by_id:
        catalogue = catalogue.reduced_to(start[0].config.modalities)
    check_content(config, catalogue)
    live = adapting.check_live(config, catalogue, live or {})
    before, recipe = None, RECIPES[config.towers.family]
    with _quiet_threads(config, split.train), torch.random.fork_rng():
        if start is None and config.pretrain_epochs:
            before = pretrained(
                catalogue, config, directory=directory / "pretrained", progress=progress, resume=resume, world=world
            )
        elif start is None and config.unit_epochs:
            before, recipe = _search_unit(catalogue, split, config, directory / "unit", world), AFTER_UNIT
            before.train(progress=progress, resume=resume, on_epoch=None)
        if before is not None:
            start = before.finish(), catalogue.item_ids
        run = Run(catalogue, split, config, directory, start, world, live, recipe)
        run.train(progress=progress, resume=resume, on_epoch=on_epoch)
        evaluated = towers = run.finish()
        run.metrics |= adapting.measured_again(evaluated, split.validation, config)
        run.metrics |= cold.settle(evaluated, split.validation, config)
        if config.refit and config.epochs:
            everything = replace(config, epochs=max(run.best_epoch, 1), refit=False)
            last = Run(catalogue, production(histories), everything, directory / "refit", start, world, live, recipe)
            last.train(progress=progress, resume=resume, on_epoch=None)
            towers = last.finish()
            cold.settle(towers, last.split.validation, replace(config, kappa=run.metrics.get("kappa")))
            last.forget()
    if world.first:
        checkpoint.save(directory, towers, config, catalogue, metrics=run.metrics)
    run.forget()
    if before is not None:
        before.forget()
    seconds = time.perf_counter() - started
    return TrainResult(towers, evaluated, config, split, run.curves, run.best_epoch, run.metrics, seconds)


def pretrained(
    catalogue: Catalogue,
    config: TrainConfig,
    *,
    directory: Path,
    progress: bool = False,
    resume: bool = True,
    world: World = ALONE,
) -> "Run":
    """The run of `pretrain_epochs` over the items of a catalogue, finished: `finish` gives its model.

    directory: for the state to resume from, which stays until `forget`.
    """
    nothing = np.zeros(0, np.int64)
    nobody = production(Histories([], np.zeros(1, np.int64), nothing, nothing))
    run = Run(
        catalogue, nobody, replace(config, epochs=config.pretrain_epochs, pretrain_epochs=0), directory, world=world,
        recipe=PRETRAINING[config.towers.family],
    )  # fmt: skip
    run.train(progress=progress, resume=resume, on_epoch=None)
    return run


def _search_unit(catalogue: Catalogue, split: Split, config: TrainConfig, directory: Path, world: World) -> "Run":
    """The run of `unit_epochs` over the training part alone."""
    shape, unasked = replace(config.towers, silent_queries=0.0), replace(split, validation=no_questions())
    wanted = replace(config, towers=shape, epochs=config.unit_epochs, refit=False)
    return Run(catalogue, unasked, wanted, directory, world=world, recipe=SEARCH_UNIT)


class Run:
    """State of one training run: towers, the optimiser with their running mean, the curves."""

    def __init__(
        self,
        catalogue: Catalogue,
        split: Split,
        config: TrainConfig,
        directory: Path,
        start: Start | None = None,
        world: World = ALONE,
        live: Mapping[str, Live] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.world, self.recipe = world, recipe or RECIPES[config.towers.family]
        self.catalogue, self.split, self.config, self.directory = catalogue, split, config, directory
        self.encoders = [one.encoder.revision for one in (live or {}).values()]
        self.device = resolve_device(config.device)
        vectors = split.train.query_vectors
        query_dim = vectors.shape[1] if config.towers.pair != "none" and vectors is not None else 0
        shape = replace(config.towers, modalities=catalogue.modalities, query_dim=query_dim)
        with seeded(config.seed, 0):
            towers = self.recipe.initial(catalogue, split.train, replace(config, towers=shape))
        if start is not None:
            self.recipe.go_on(towers, start, catalogue)
        if live:
            assert isinstance(towers.source, Frozen)
            with seeded(config.seed, 0):
                towers.source = Adapted(towers.source, live, config)
        self.towers = towers.to(self.device)
        by_row = config.table_optimiser == "rowwise"
        if isinstance(towers, Towers):
            towers.item_tower.sparse = by_row
        self.optimiser = Optimiser(
            self.towers,
            weight_decay=config.weight_decay,
            averaged=config.ema > 0,
            table="item_tower.table" if by_row else None,
            shares={"source.lora.": config.encoder_rate},
        )
        counts = torch.from_numpy(split.train.counts(len(catalogue)))
        self.warm = torch.nonzero(counts > 0).squeeze(1).to(self.device)
        self.frequency = (counts[self.warm.cpu()].double() / counts.sum()).float().to(self.device)
        self.curves: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch, self.metrics, self.steps = 0, dict[str, float](), 0

    def train(self, *, progress: bool, resume: bool, on_epoch: Callable[[Epoch], None] | None) -> None:
        """Epochs until the last one, or until validation stops getting better."""
        if resume:
            self._resume()
        bar = tqdm(
            total=self.config.epochs,
            initial=len(self.curves),
            desc="train",
            unit="epoch",
            disable=None if progress and self.world.first else True,
        )
        with bar:
            while len(self.curves) < self.config.epochs and not self._exhausted():
                point = self._epoch(len(self.curves) + 1)
                self.curves.append(point)
                bar.update()
                bar.set_postfix(loss=f"{point.loss:.3f}", ndcg=f"{point.ndcg_10 or 0:.4f}")
                if self.world.first:
                    self._save_state()
                self.world.wait()
                if on_epoch is not None and self.world.first:
                    on_epoch(point)
        if not self.config.epochs:
            self._validated(Epoch(0, 0.0, 0.0, 0))  # what is served is the start

    def finish(self) -> Model:
        """The model with the best weights, in evaluation mode on the CPU, over the content as it is to read it."""
        weights = {**self.towers.state_dict(), **self.optimiser.average(), **self.best}
        catalogue, source = self.catalogue, self.towers.source
        if isinstance(source, Adapted):
            source.load_state_dict(_with_prefix(weights, "source."))
            catalogue = source.encoded(catalogue)
        towers = FAMILIES[self.towers.config.family].model(self.towers.config, catalogue)
        kept = {name: value.cpu() for name, value in weights.items() if not name.startswith("source.")}
        towers.load_state_dict(kept)
        towers.adapters = source.adapters() if isinstance(source, Adapted) else {}
        return towers.eval()

    def forget(self) -> None:
        """Removes the state to resume from."""
        self.world.wait()
        if self.world.first:
            self._state.unlink(missing_ok=True)

    def _epoch(self, epoch: int) -> Epoch:
        started = time.perf_counter()
        with seeded(self.config.seed, epoch) as rng:
            rows = self.recipe.rows(self.catalogue, self.split.train, self.config, rng)
            size = self.recipe.step(self.config)
            if not len(rows):
                raise UserError("training: no history holds two events of items with content")
            total = -(-len(rows) // size)
            summed, positions = 0.0, 0
            self.towers.train()
            share = {"share": self.world.rank, "shares": self.world.size}
            for step, batch in enumerate(self.recipe.batches(rows, size, self.device, **share)):
                done = (epoch - 1 + step / total) / self.config.epochs
                rate = self.config.learning_rate * (1 - (1 - self.config.final_rate) * done)
                if self.world.size > 1:  # what a process draws depends on its rows: all start each step alike
                    torch.manual_seed((self.config.seed * 1_000_003 + epoch) * 1_000_003 + step)
                loss, count = self.step(batch, rate, f"epoch {epoch}, batch {step + 1} of {total}")
                summed += loss * count
                positions += count
        point = Epoch(epoch, summed / positions, time.perf_counter() - started, positions)
        return self._validated(point)

    def step(self, batch: Any, rate: float, where: str) -> tuple[float, int]:
        """One optimiser step; returns the ranking loss, and of how many positions it is the mean."""
        total, ranking = torch.zeros(()), 0.0
        if len(batch.targets):
            with autocast(self.device):
                found, total = self.recipe.loss(self.towers, batch, self.config, self.warm, self.frequency)
            ranking = float(found)
        own = len(batch.targets)
        ranking, check, count = self.world.total(ranking * own, float(total.detach()), own)
        if not math.isfinite(check):
            users = [self.split.train.user_ids[user] for user in batch.users[:5]]
            raise UserError(
                f"training: the loss is {check} at {where} (users {', '.join(users)} ...); lower the learning "
                f"rate ({self.config.learning_rate}) or look for bad content embeddings; the last good state is in "
                f"{self.directory}"
            )
        if own:
            (total if self.world.size == 1 else total * (own / count)).backward()  # type: ignore[no-untyped-call]
        self.world.add_gradients(self.towers.parameters(), self.optimiser.table)
        self.steps += 1
        # a young mean follows the weights closely, or it would remember their random start
        self.optimiser.step(rate, min(self.config.ema, (1 + self.steps) / (10 + self.steps)))
        return ranking / count, int(count)

    def _validated(self, point: Epoch) -> Epoch:
        due = point.epoch % self.config.validate_every == 0 or point.epoch == self.config.epochs
        if not due or not len(self.split.validation):
            return point
        ndcg = recall = 0.0
        if self.world.first:
            with self._averaged():
                scorer = TowersScorer(self.towers, softness=self.config.softness)
                ndcg, recall = validation_ndcg(scorer, self.split.validation, len(self.catalogue))
        ndcg, recall = self.world.from_first(ndcg, recall)
        if not self.metrics or ndcg > self.metrics["ndcg@10"]:
            self.metrics, self.best_epoch = {"ndcg@10": ndcg, "recall@50": recall}, point.epoch
            weights = dict(self.towers.named_parameters()) | self.optimiser.average()
            self.best = {name: value.detach().clone() for name, value in weights.items()}
        return replace(point, ndcg_10=ndcg, recall_50=recall)

    def _exhausted(self) -> bool:
        return bool(self.metrics) and len(self.curves) - self.best_epoch >= (
            self.config.patience * self.config.validate_every
        )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the towers have the running mean of their weights."""
        parameters = dict(self.towers.named_parameters())
        kept = {name: value.data for name, value in parameters.items()}
        for name, value in self.optimiser.average().items():
            parameters[name].data = value
        try:
            yield
        finally:
            for name, value in kept.items():
                parameters[name].data = value

    def _identity(self) -> dict[str, Any]:
        document = asdict(self.config) | {"threads": None, "device": None}
        return {
            "config": document,
            "data": [
                self.catalogue.fingerprint(),
                self.split.train.fingerprint(*self.config.towers.reads),
                *self.encoders,
            ],
        }

    @property
    def _state(self) -> Path:
        return self.directory / "state.safetensors"

    def _save_state(self) -> None:
        tensors = {f"weights.{name}": value for name, value in self.towers.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.optimiser.average().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"optimiser.{name}": value for name, value in self.optimiser.state().items()}
        counts = {"best_epoch": self.best_epoch, "steps": self.steps, "metrics": self.metrics}
        curves = [asdict(point) for point in self.curves]
        # One file: a kill between two would leave weights of one epoch beside the count of another.
        checkpoint.write_tensors(self._state, tensors, self._identity() | counts | {"curves": curves})

    def _resume(self) -> None:
        document = checkpoint.read_document(self._state)
        if document is None:
            return
        wanted = checkpoint.as_json(self._identity())
        begun = asdict(config_from_json(document["config"])) | {"threads": None, "device": None}
        document["config"] = checkpoint.as_json(begun)  # options that are younger than the run have their defaults
        if any(document[name] != wanted[name] for name in wanted):
            raise UserError(
                f"{self.directory}: holds an unfinished training of another configuration or other data; "
                "finish it as it was begun, or start anew (resume=False, or remove the folder)"
            )
        tensors = checkpoint.read_tensors(self._state)
        part = {prefix: _with_prefix(tensors, prefix + ".") for prefix in ("weights", "average", "best", "optimiser")}
        self.towers.load_state_dict(part["weights"])
        self.best = {name: value.to(self.device) for name, value in part["best"].items()}
        self.optimiser.restore(part["optimiser"], part["average"])
        self.best_epoch, self.steps, self.metrics = document["best_epoch"], document["steps"], document["metrics"]
        self.curves = [Epoch(**point) for point in document["curves"]]


@contextmanager
def seeded(seed: int, epoch: int) -> Iterator[np.random.Generator]:
    """Inside, torch and the yielded generator draw from (seed, epoch); torch's own state comes back after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed * 1_000_003 + epoch)
        yield np.random.default_rng([seed, epoch])


@contextmanager
def _quiet_threads(config: TrainConfig, histories: Histories) -> Iterator[None]:
    """One thread for small problems: two on a shared core spin and wait for each other."""
    before = torch.get_num_threads()
    small = len(histories.items) * config.towers.dim < _SMALL and not config.lora_rank
    torch.set_num_threads(config.threads or (1 if small else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

"""Offline evaluation of a generation's towers on the snapshot that they were trained on, beside the baselines."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg

from encoders.training.checkpoint import adapters
from pipelines.generation import lifecycle
from pipelines.generation.training import EVALUATED, aligned, located, read_snapshot
from pipelines.generation.training_set import read_catalogue
from polytower.errors import UserError

Metrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class EvaluationReport:
    """metrics and each of baselines: {"masked": {name: value}, "unmasked": {...}}, of the test items.

    protocol: how the test items were held out. questions: users asked, of so many `users` who could be.
    """

    generation: int
    preset: str
    protocol: str
    questions: int
    users: int
    metrics: Metrics
    baselines: Mapping[str, Metrics]

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return asdict(self)

    def contestants(self, masking: str) -> dict[str, Mapping[str, float]]:
        """Metrics by contestant, polytower first, for "masked" or "unmasked"."""
        return {"polytower": self.metrics[masking]} | {who: found[masking] for who, found in self.baselines.items()}


def evaluate_generation(
    connection: psycopg.Connection[Any], generation: int | None = None, *, progress: bool = False
) -> EvaluationReport:
    """Strict leave-one-out on the training snapshot: the test item was neither trained on nor selected with.

    generation: its number; None takes the live one. Raises UserError when there is none, or when its checkpoint folder
    is not on this machine.
    """
    found = lifecycle.get(connection, generation) if generation is not None else lifecycle.live(connection)
    if found is None:
        raise UserError("no generation is live: run `polytower materialize` first")
    directory = located(found.checkpoint_path)
    if directory is None:
        path = found.checkpoint_path or ""
        raise UserError(f"generation {found.generation}: its checkpoint folder {path} is not on this machine")
    strict = directory / EVALUATED
    catalogue, _ = read_catalogue(connection, adapters(strict if strict.is_dir() else directory))
    return evaluate_checkpoint(found.generation, directory, catalogue, progress=progress)


def evaluate_checkpoint(
    generation: int, directory: Path, catalogue: Any, *, progress: bool = False
) -> EvaluationReport:
    """The same for a checkpoint folder and the catalogue that holds its items' content."""
    from encoders.evaluation.baselines import baselines
    from encoders.evaluation.evaluate import TowersScorer, asked, evaluate
    from encoders.evaluation.splits import leave_one_out
    from encoders.training import checkpoint

    item_ids, histories = read_snapshot(directory)
    strict = directory / EVALUATED
    towers, config, _ = checkpoint.load(strict if strict.is_dir() else directory, aligned(catalogue, item_ids))
    split = leave_one_out(histories)
    if not len(split.test):
        raise UserError("no user has three interactions: there is nothing to evaluate on")
    scorer = TowersScorer(towers, softness=config.softness)
    contestants = {"polytower": scorer, **baselines(split.train, len(item_ids))}
    results = {
        name: evaluate(one, split.test, len(item_ids), vectors_VD=scorer.items_VD, progress=progress)
        for name, one in contestants.items()
    }
    model = results.pop("polytower")
    return EvaluationReport(
        generation,
        config.preset,
        "leave-one-out, full ranking, ties against the model",
        len(asked(split.test)),
        len(split.test),
        model,
        results,
    )

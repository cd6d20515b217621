"""Experiments without a database: train, evaluate, compare, over several seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from encoders.catalogue import BoolArray, Catalogue, FloatArray, Histories
from encoders.config import TrainConfig, changed
from encoders.content.attributes import user_vectors
from encoders.content.registry import CONTENT_ENCODERS, DEFAULT
from encoders.evaluation.baselines import baselines
from encoders.evaluation.evaluate import Metrics, TowersScorer, asked, evaluate, interests_report
from encoders.evaluation.splits import (
    Split,
    cold_items,
    cold_users,
    leave_one_out,
    refit,
    strong_generalisation,
    temporal,
)
from encoders.presets import preset
from encoders.training.distributed import ALONE, World
from encoders.training.train import TrainResult, train
from feature_repo.modalities import Modality, modality
from polytower.errors import UserError

SPLITS = ("leave_one_out", "refit", "temporal", "strong_generalisation", "cold_items", "cold_users")
_CHUNK = 512  # contents encoded at a time


@dataclass(frozen=True, eq=False)
class Dataset:
    """What an experiment reads (pipelines.load.dataset.read_folder makes it of a contract folder).

    item_ids: the catalogue in its order. items: the columns of `items` (image: a name) of the first of them.
    users: what is known of each user of the histories, {attribute: value}; None where there is no table of users.
    """

    name: str
    item_ids: list[str]
    items: Sequence[Mapping[str, Any]]
    histories: Histories
    users: Sequence[Mapping[str, Any]] | None = None


def run_experiment(
    data: Dataset,
    preset_name: str,
    seeds: Sequence[int],
    *,
    directory: Path,
    modalities: Sequence[str] = (),
    split: str = "leave_one_out",
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    progress: bool = False,
    images: Path | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Trains the preset once per seed, evaluates on the split's test questions beside the baselines; JSON-able.

    directory: receives a checkpoint per seed (seed-N) and is resumed from. modalities: content to encode and use, none
    by default; images: the folder that the items' `image` names files in. options: see `config.changed`. world: see
    `train`.
    "refit" takes its number of epochs from a strict run of the same seed, so that nothing is selected on test items.
    "interests" in the report is of the first seed.
    """
    config = changed(replace(preset(preset_name), device=device), options or {})
    catalogue = encoded_catalogue(data, modalities, device=device, images=images)
    histories = with_users(data, config.towers.user_attributes)
    cut = make_split(split, histories, len(catalogue))
    if not len(cut.test):
        raise UserError(f"{data.name}: the split {split} leaves no question to test on")
    results: list[TrainResult] = []
    for seed in seeds:
        seeded = replace(config, seed=seed)
        place = directory / f"seed-{seed}"
        results.append(_trained(catalogue, histories, seeded, cut, place, progress=progress, world=world))
    scorers = [TowersScorer(result.evaluated, softness=config.softness) for result in results]
    measured = [evaluate(scorer, cut.test, len(catalogue), vectors_VD=scorer.items_VD) for scorer in scorers]
    points = [point for result in results for point in result.curves]
    return {
        "data": data.name,
        "preset": preset_name,
        "split": split,
        "questions": len(asked(cut.test)),
        "users": len(cut.test),
        "seeds": list(seeds),
        "modalities": list(modalities),
        "parameters": sum(value.numel() for value in results[0].evaluated.parameters()),
        "seconds_per_epoch": round(fmean(point.seconds for point in points), 3),
        "epochs": [len(result.curves) for result in results],
        "best_epochs": [result.best_epoch for result in results],
        "seconds": [round(result.seconds, 1) for result in results],
        "metrics": {track: _spread([one[track] for one in measured]) for track in ("masked", "unmasked")},
        "interests": interests_report(scorers[0], cut.test),
        "baselines": {
            name: evaluate(scorer, cut.test, len(catalogue))
            for name, scorer in baselines(cut.train, len(catalogue)).items()
        },
    }


def encoded_catalogue(
    data: Dataset, modalities: Sequence[str] = (), *, device: str = "auto", images: Path | None = None
) -> Catalogue:
    """The catalogue with the content of these modalities.

    images: where the files lie that the items name; a picture that is absent or unreadable counts as none. Raises
    UserError for the modality image without it.
    """
    content: dict[str, FloatArray] = {}
    present: dict[str, BoolArray] = {}
    for name in modalities:
        content[name], present[name] = _encoded(name, data, device, images)
    return Catalogue(data.item_ids, content, present)


def with_users(data: Dataset, width: int) -> Histories:
    """The histories with the users' attributes hashed to `width` numbers; 0 leaves them out."""
    if not width:
        return data.histories
    if data.users is None:
        raise UserError(f"{data.name} holds no users, from which towers.user_attributes would be read")
    return replace(data.histories, attributes=user_vectors(data.users, width))


def make_split(name: str, histories: Histories, items: int) -> Split:
    """The split of that name. Raises UserError for an unknown one."""
    if name == "cold_items":
        return cold_items(histories, items)
    rules = {
        "leave_one_out": leave_one_out,
        "refit": refit,
        "temporal": temporal,
        "strong_generalisation": strong_generalisation,
        "cold_users": cold_users,
    }
    if name not in rules:
        raise UserError(f"no split {name!r}; there are {', '.join(SPLITS)}")
    return rules[name](histories)


def _trained(
    catalogue: Catalogue,
    histories: Histories,
    config: TrainConfig,
    cut: Split,
    directory: Path,
    *,
    progress: bool,
    world: World,
) -> TrainResult:
    if cut.name == "refit":
        strict = train(catalogue, histories, config, directory=directory / "strict", progress=progress, world=world)
        config = replace(config, epochs=max(1, strict.best_epoch))
    return train(catalogue, histories, config, directory=directory, progress=progress, split=cut, world=world)


def _spread(runs: list[Metrics]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation of each metric over the seeds (0 for one seed)."""
    return {
        name: {
            "mean": fmean(run[name] for run in runs),
            "std": stdev([run[name] for run in runs]) if len(runs) > 1 else 0.0,
        }
        for name in runs[0]
    }


def _encoded(name: str, data: Dataset, device: str, images: Path | None) -> tuple[FloatArray, BoolArray]:
    """(rows [V, dim], present [V]) of one modality; items without it, or without a description, have zero rows."""
    record = modality(name)
    items = [_pictured(images, row) for row in data.items] if record.is_file else data.items
    contents = [record.content(row) for row in items]
    there = np.flatnonzero([content is not None for content in contents])
    encoder = CONTENT_ENCODERS[name](device=device, model=_model(record, items))
    size = len(data.item_ids)
    embeddings, present = np.zeros((size, encoder.dim), dtype=np.float32), np.zeros(size, dtype=np.bool_)
    chunks = [there[start : start + _CHUNK] for start in range(0, len(there), _CHUNK)]
    encoded = encoder.encode_chunks([contents[row] for row in chunk] for chunk in chunks)
    for chunk, found in zip(chunks, encoded, strict=True):
        embeddings[chunk] = found.embeddings
        present[chunk] = True
        present[chunk[list(found.failures)]] = False
    return embeddings, present


def _model(record: Modality, items: Sequence[Mapping[str, Any]]) -> str:
    named = (row[record.model_column] for row in items if record.model_column and row[record.model_column])
    return next(named, DEFAULT)


def _pictured(images: Path | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """The item with the file of its image, where there is one inside the folder."""
    if images is None or not images.is_dir():
        raise UserError(f"experiment: images need the folder that holds them (--images DIR); {images} is none")
    name = row["image"]
    path = (images / name).resolve() if name else None
    found = path is not None and path.is_relative_to(images.resolve()) and path.is_file()
    # Nobody asks an experiment whether a file changed: the name stands for its hash.
    return {**row, "image_path": path, "image_sha256": name} if found else dict(row)

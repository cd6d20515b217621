"""Experiments straight from a contract folder, without a database: train, evaluate, compare, over several seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from encoders import checkpoint
from encoders.attributes import user_vectors
from encoders.baselines import baselines, item_tokens
from encoders.catalogue import BoolArray, Catalogue, FloatArray, Histories, digest
from encoders.comparison import differences, segments
from encoders.config import TrainConfig, changed
from encoders.content import item_text, says_something
from encoders.content_encoders import CONTENT_ENCODERS
from encoders.distributed import ALONE, World
from encoders.evaluate import TRACKS, Metrics, Ranked, TowersScorer, interests_report, rank, summary
from encoders.folder import read_interactions, read_items, read_users
from encoders.presets import preset
from encoders.splits import Split, cold_items, cold_users, future, leave_one_out, refit, strong_generalisation, temporal
from encoders.train import TrainResult, train
from feature_repo.schema import Modality
from polytower.errors import UserError

SPLITS = ("leave_one_out", "refit", "temporal", "strong_generalisation", "cold_items", "cold_users", "future")
_CHUNK = 512  # contents encoded at a time
_RANKS = "ranks.safetensors"
_NOT_ATTRIBUTES = ("item_id", "title", "description", "image", "available")


def run_experiment(
    folder: Path,
    preset_name: str,
    seeds: Sequence[int],
    *,
    directory: Path,
    modalities: Sequence[Modality] = (),
    split: str = "leave_one_out",
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    progress: bool = False,
    images: Path | None = None,
    world: World = ALONE,
    controls: Sequence[str] = (),
    against: Path | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Trains the preset once per seed, evaluates on the split's test questions beside the baselines; JSON-able.

    directory: receives a checkpoint per seed (seed-N) and is resumed from. modalities: content to encode and use, none
    by default; images: the folder that the items' `image` names files in. options: see `config.changed`. world: see
    `train`. controls: names of CONTROLS, trained in the same way for a paired comparison; against: the directory of
    another run over the same questions, compared likewise. cache: where encoded content is kept for the next run.
    "refit" takes its number of epochs from a strict run of the same seed, so that nothing is selected on test items.
    "interests" in the report is of the first seed.
    """
    config = changed(replace(preset(preset_name), device=device), options or {})
    item_ids, catalogue, histories = read_folder(
        folder, modalities, device=device, images=images, user_attributes=config.towers.user_attributes, cache=cache
    )
    cut = make_split(split, histories, len(item_ids))
    if not len(cut.test):
        raise UserError(f"{folder}: the split {split} leaves no question to test on")
    others = {name: _control(name, catalogue, config) for name in controls}
    fitted = baselines(cut.train, len(item_ids), _documents(folder, item_ids) if modalities else (), cut.validation)
    simple = {name: rank(scorer, cut.test, len(item_ids)) for name, scorer in fitted.items()}
    found = _run(catalogue, histories, config, cut, seeds, directory, progress=progress, world=world)
    results, scorers, ranked = found.results, found.scorers, found.ranked
    measured = [
        summary(one, len(item_ids), vectors_VD=scorer.items_VD) for one, scorer in zip(ranked, scorers, strict=True)
    ]
    points = [point for result in results for point in result.curves]
    ours = torch.stack([one.ranks["masked"] for one in ranked])
    apart = {name: one.ranks["masked"][None] for name, one in simple.items()}
    controlled = {}
    for name, (other, changed_config) in others.items():
        run = _run(other, histories, changed_config, cut, seeds, directory / name, progress=progress, world=world)
        apart[name] = torch.stack([one.ranks["masked"] for one in run.ranked])
        controlled[name] = _spread([summary(one, len(item_ids))["masked"] for one in run.ranked])
    if against is not None:
        apart[str(against)] = _kept_ranks(against, cut)
    if world.first:
        _keep_ranks(directory, cut, ours)
    return {
        "data": folder.name,
        "preset": preset_name,
        "split": split,
        "questions": len(cut.test),
        "seeds": list(seeds),
        "modalities": list(modalities),
        "parameters": sum(value.numel() for value in results[0].evaluated.parameters()),
        "seconds_per_epoch": round(fmean(point.seconds for point in points), 3),
        "epochs": [len(result.curves) for result in results],
        "best_epochs": [result.best_epoch for result in results],
        "seconds": [round(result.seconds, 1) for result in results],
        "validation": [result.metrics for result in results],
        "metrics": {track: _spread([one[track] for one in measured]) for track in TRACKS},
        "segments": segments(ours, cut.test, cut.train, len(item_ids)),
        "interests": interests_report(scorers[0], cut.test),
        "baselines": {name: summary(one, len(item_ids)) for name, one in simple.items()},
        "controls": controlled,
        "differences": {name: differences(ours, theirs, ranked[0].sets) for name, theirs in apart.items()},
    }


def read_folder(
    folder: Path,
    modalities: Sequence[Modality] = (),
    *,
    device: str = "auto",
    images: Path | None = None,
    user_attributes: int = 0,
    cache: Path | None = None,
) -> tuple[list[str], Catalogue, Histories]:
    """(item ids, catalogue with the content of these modalities, histories) of a contract folder.

    images: where the files lie that the items name; a picture that is absent or unreadable counts as none. Raises
    UserError for the modality image without it. user_attributes: width that the users' attributes are hashed to; 0
    leaves them out. cache: folder in which encoded content is kept, and found again.
    """
    items = read_items(folder)
    item_ids, histories = read_interactions(folder, items["item_id"].to_pylist())
    if user_attributes:
        known = read_users(folder, histories.user_ids)
        histories = replace(histories, attributes=user_vectors(known, user_attributes))
    content: dict[str, FloatArray] = {}
    present: dict[str, BoolArray] = {}
    for modality in modalities:
        content[modality], present[modality] = _encoded(modality, items, len(item_ids), device, images, cache)
    return item_ids, Catalogue(item_ids, content, present), histories


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
        "future": future,
    }
    if name not in rules:
        raise UserError(f"no split {name!r}; there are {', '.join(SPLITS)}")
    return rules[name](histories)


@dataclass(frozen=True, eq=False)
class Trained:
    """One configuration over all seeds: what was trained, its scorer, and how it ranks the test questions."""

    results: list[TrainResult]
    scorers: list[TowersScorer]
    ranked: list[Ranked]


def _run(
    catalogue: Catalogue,
    histories: Histories,
    config: TrainConfig,
    cut: Split,
    seeds: Sequence[int],
    directory: Path,
    *,
    progress: bool,
    world: World,
) -> Trained:
    results = [
        _trained(
            catalogue, histories, replace(config, seed=seed), cut, directory / f"seed-{seed}",
            progress=progress, world=world,
        )
        for seed in seeds
    ]  # fmt: skip
    scorers = [TowersScorer(result.evaluated, softness=config.softness) for result in results]
    return Trained(results, scorers, [rank(scorer, cut.test, len(catalogue)) for scorer in scorers])


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


def _control(name: str, catalogue: Catalogue, config: TrainConfig) -> tuple[Catalogue, TrainConfig]:
    if name not in CONTROLS:
        raise UserError(f"no control {name!r}; there are {', '.join(CONTROLS)}")
    if not catalogue.modalities:
        raise UserError(f"the control {name} compares with a run that has content; name it with --content")
    return CONTROLS[name](catalogue, config)


def equal_width(catalogue: Catalogue, config: TrainConfig) -> tuple[Catalogue, TrainConfig]:
    """IDs alone, in as many dimensions: what width gives by itself."""
    towers = replace(config.towers, content_dim=0, cold="content", id_dropout=0.0, shrinkage=0.0)
    return Catalogue(catalogue.item_ids), replace(config, towers=towers)


def permuted(catalogue: Catalogue, config: TrainConfig) -> tuple[Catalogue, TrainConfig]:
    """Every item has the content of another one: what content gives that says nothing."""
    order = np.random.default_rng(0).permutation(len(catalogue))
    content = {name: rows[order] for name, rows in catalogue.content.items()}
    present = {name: found[order] for name, found in catalogue.present.items()}
    return Catalogue(catalogue.item_ids, content, present), config


CONTROLS = {"equal_width": equal_width, "permuted": permuted}


def _documents(folder: Path, item_ids: Sequence[str]) -> list[list[str]]:
    rows = read_items(folder).to_pylist()
    found = [item_tokens(row.get("title"), row.get("description"), _attributes(row)) for row in rows]
    return found + [[] for _ in range(len(item_ids) - len(found))]


def _keep_ranks(directory: Path, cut: Split, ranks_SQ: torch.Tensor) -> None:
    asked = {"targets": torch.from_numpy(cut.test.targets), "lengths": torch.from_numpy(cut.test.histories.lengths)}
    checkpoint.write_tensors(directory / _RANKS, {"ranks": ranks_SQ, **asked})


def _kept_ranks(directory: Path, cut: Split) -> torch.Tensor:
    """Ranks [S, Q] of another run. Raises UserError where its questions were others."""
    if not (directory / _RANKS).is_file():
        raise UserError(f"{directory}: no {_RANKS}; name the folder that another experiment was written into (--into)")
    kept = checkpoint.read_tensors(directory / _RANKS)
    if not torch.equal(kept["targets"], torch.from_numpy(cut.test.targets)) or not torch.equal(
        kept["lengths"], torch.from_numpy(cut.test.histories.lengths)
    ):
        raise UserError(f"{directory}: answers other questions (data, split or order of items differ)")
    return kept["ranks"]


def _spread(runs: list[Metrics]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation of each metric over the seeds (0 for one seed)."""
    return {
        name: {
            "mean": fmean(run[name] for run in runs),
            "std": stdev([run[name] for run in runs]) if len(runs) > 1 else 0.0,
        }
        for name in runs[0]
    }


def _encoded(
    modality: Modality, items: pa.Table, size: int, device: str, images: Path | None, cache: Path | None = None
) -> tuple[FloatArray, BoolArray]:
    """(rows [V, dim], present [V]) of one modality; items without it, or without a description, have zero rows."""
    rows = items.to_pylist()
    contents: list[Any]
    if modality == "image":
        contents = [_picture(images, row.get("image")) for row in rows]
        has = [path is not None for path in contents]
    elif modality == "text":
        contents = [item_text(row.get("title"), row.get("description")) for row in rows]
        has = [bool(text) for text in contents]
    else:
        contents = [_attributes(row) for row in rows]
        has = [says_something(attributes) for attributes in contents]
    encoder = CONTENT_ENCODERS[modality](device=device)
    there = np.flatnonzero(has)
    kept = cache / f"{modality}-{_cache_key(encoder.revision, contents, size)}.safetensors" if cache else None
    if kept is not None and kept.is_file():
        found_before = checkpoint.read_tensors(kept)
        return found_before["embeddings"].numpy(), found_before["present"].numpy()
    embeddings, present = np.zeros((size, encoder.dim), dtype=np.float32), np.zeros(size, dtype=np.bool_)
    chunks = [there[start : start + _CHUNK] for start in range(0, len(there), _CHUNK)]
    encoded = encoder.encode_chunks([contents[row] for row in chunk] for chunk in chunks)
    for chunk, found in zip(chunks, encoded, strict=True):
        embeddings[chunk] = found.embeddings
        present[chunk] = True
        present[chunk[list(found.failures)]] = False
    if kept is not None:
        checkpoint.write_tensors(
            kept, {"embeddings": torch.from_numpy(embeddings), "present": torch.from_numpy(present)}
        )
    return embeddings, present


def _attributes(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _NOT_ATTRIBUTES}


def _cache_key(revision: str, contents: Sequence[Any], size: int) -> str:
    """Names encoded content by encoder and contents; a picture counts by its path, size and time of change."""
    told = [
        f"{content}:{content.stat().st_size}:{content.stat().st_mtime_ns}"
        if isinstance(content, Path)
        else str(content)
        for content in contents
    ]
    return digest([revision, str(size), *told])


def _picture(images: Path | None, name: str | None) -> Path | None:
    """The file of an item's image; None where there is none inside the folder."""
    if images is None or not images.is_dir():
        raise UserError(f"experiment: images need the folder that holds them (--images DIR); {images} is none")
    path = (images / name).resolve() if name else None
    return path if path is not None and path.is_relative_to(images.resolve()) and path.is_file() else None

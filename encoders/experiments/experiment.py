"""Experiments without a database: train, evaluate, compare, over several seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch

from encoders.catalogue import BoolArray, Catalogue, FloatArray, Histories, IntArray, digest
from encoders.config import changed
from encoders.content.attributes import user_vectors
from encoders.content.encoder import ContentEncoder
from encoders.content.registry import CONTENT_ENCODERS, DEFAULT
from encoders.evaluation.baselines import baselines, item_tokens
from encoders.evaluation.comparison import differences, segments
from encoders.evaluation.evaluate import TRACKS, Metrics, Ranked, TowersScorer, asked, interests_report, rank, summary
from encoders.evaluation.splits import (
    Questions,
    Split,
    cold_items,
    cold_users,
    future,
    leave_one_out,
    refit,
    searches,
    strong_generalisation,
    temporal,
)
from encoders.experiments.controls import Subject, control
from encoders.presets import preset
from encoders.towers.adapted import Live, live_of
from encoders.training import checkpoint
from encoders.training.distributed import ALONE, World
from encoders.training.start import Start, read_start
from encoders.training.train import TrainResult, train
from feature_repo.modalities import Modality, modality
from polytower.errors import UserError

SPLITS = (
    "leave_one_out",
    "refit",
    "temporal",
    "strong_generalisation",
    "cold_items",
    "cold_users",
    "future",
    "searches",
)
_CHUNK = 512  # contents encoded at a time
_RANKS = "ranks.safetensors"


class Queries(NamedTuple):
    """of_event: int64 [N], what each event of the histories was searched by, a place in texts; −1 for nothing."""

    of_event: IntArray
    texts: list[str]


@dataclass(frozen=True, eq=False)
class Dataset:
    """What an experiment reads (pipelines.load.dataset.read_folder makes it of a contract folder).

    item_ids: the catalogue in its order. items: the columns of `items` (image: a name) of the first of them.
    users: what is known of each user of the histories, {attribute: value}; None where there is no table of users.
    encoders: the encoder that is set for a modality; the default one where none is.
    """

    name: str
    item_ids: list[str]
    items: Sequence[Mapping[str, Any]]
    histories: Histories
    users: Sequence[Mapping[str, Any]] | None = None
    queries: Queries | None = None
    encoders: Mapping[str, str] = field(default_factory=dict)


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
    controls: Sequence[str] = (),
    against: Path | None = None,
    cache: Path | None = None,
    start: Path | None = None,
) -> dict[str, Any]:
    """Trains the preset once per seed, evaluates on the split's test questions beside the baselines; JSON-able.

    directory: receives a checkpoint per seed (seed-N) and is resumed from. modalities: content to encode and use, none
    by default; images: the folder that the items' `image` names files in. options: see `config.changed`. world: see
    `train`. controls: names of CONTROLS, trained in the same way for a paired comparison; against: the directory of
    another run over the same questions, compared likewise. cache: where encoded content is kept for the next run.
    start: folder of a pretrained model that every seed goes on from (`read_start`).
    "refit" takes its number of epochs from a strict run of the same seed, so that nothing is selected on test items.
    "interests" in the report is of the first seed.
    """
    config = changed(replace(preset(preset_name), device=device), options or {})
    catalogue, encoders = encoded(data, modalities, device=device, images=images, cache=cache)
    begin, told = (None, []) if start is None else read_start(start, catalogue, encoders)
    histories = with_users(data, config.towers.user_attributes)
    if "queries" in config.towers.reads or split == "searches":
        histories = with_queries(data, histories, device=device, cache=cache)
    cut = make_split(split, histories, len(catalogue))
    if not len(cut.test):
        raise UserError(f"{data.name}: the split {split} leaves no question to test on")
    subject = Subject(catalogue, config, _live(data, modalities, device, images) if config.lora_rank else {})
    others = {name: control(name, subject) for name in controls}
    test, items = asked(cut.test), len(catalogue)
    fitted = baselines(cut.train, items, _documents(data) if modalities else (), cut.validation, catalogue)
    simple = {name: rank(scorer, test, items) for name, scorer in fitted.items()}
    found = _run(subject, histories, cut, seeds, directory, progress=progress, world=world, start=begin)
    results, scorers, ranked = found.results, found.scorers, found.ranked
    measured = [summary(one, items, vectors_VD=scorer.items_VD) for one, scorer in zip(ranked, scorers, strict=True)]
    points = [point for result in results for point in result.curves]
    ours = torch.stack([one.ranks["masked"] for one in ranked])
    apart = {name: one.ranks["masked"][None] for name, one in simple.items()}
    controlled = {}
    for name, other in others.items():
        run = _run(other, histories, cut, seeds, directory / name, progress=progress, world=world, start=begin)
        apart[name] = torch.stack([one.ranks["masked"] for one in run.ranked])
        controlled[name] = _spread([summary(one, items)["masked"] for one in run.ranked])
    if against is not None:
        apart[str(against)] = _kept_ranks(against, test)
    if world.first:
        _keep_ranks(directory, test, ours)
    return {
        "data": data.name,
        "preset": preset_name,
        "split": split,
        "questions": len(test),
        "users": len(cut.test),
        "seeds": list(seeds),
        "modalities": list(modalities),
        "adapted": list(subject.live),
        "told": told,
        "parameters": sum(value.numel() for value in results[0].evaluated.parameters()),
        "seconds_per_epoch": round(fmean([point.seconds for point in points] or [0.0]), 3),
        "epochs": [len(result.curves) for result in results],
        "best_epochs": [result.best_epoch for result in results],
        "seconds": [round(result.seconds, 1) for result in results],
        "validation": [result.metrics for result in results],
        "metrics": {track: _spread([one[track] for one in measured]) for track in TRACKS},
        "segments": segments(ours, test, cut.train, items),
        "interests": interests_report(scorers[0], test),
        "baselines": {name: summary(one, items) for name, one in simple.items()},
        "controls": controlled,
        "differences": {name: differences(ours, theirs, ranked[0].sets) for name, theirs in apart.items()},
    }


def encoded_catalogue(
    data: Dataset,
    modalities: Sequence[str] = (),
    *,
    device: str = "auto",
    images: Path | None = None,
    cache: Path | None = None,
) -> Catalogue:
    """The catalogue of `encoded` alone."""
    return encoded(data, modalities, device=device, images=images, cache=cache)[0]


def encoded(
    data: Dataset,
    modalities: Sequence[str] = (),
    *,
    device: str = "auto",
    images: Path | None = None,
    cache: Path | None = None,
) -> tuple[Catalogue, dict[str, str]]:
    """(the catalogue with the content of these modalities, the revision of the encoder of each).

    images: where the files lie that the items name; a picture that is absent or unreadable counts as none. Raises
    UserError for the modality image without it. cache: folder in which encoded content is kept, and found again.
    """
    content: dict[str, FloatArray] = {}
    present: dict[str, BoolArray] = {}
    revisions: dict[str, str] = {}
    for name in modalities:
        content[name], present[name], revisions[name] = _encoded(name, data, device, images, cache)
    return Catalogue(data.item_ids, content, present), revisions


def with_users(data: Dataset, width: int) -> Histories:
    """The histories with the users' attributes hashed to `width` numbers; 0 leaves them out."""
    if not width:
        return data.histories
    if data.users is None:
        raise UserError(f"{data.name} holds no users, from which towers.user_attributes would be read")
    return replace(data.histories, attributes=user_vectors(data.users, width))


def with_queries(data: Dataset, histories: Histories, *, device: str = "auto", cache: Path | None = None) -> Histories:
    """The histories with what their events were searched by, each distinct text encoded once."""
    if data.queries is None or not data.queries.texts:
        return histories
    described = [{"title": text, "description": None} for text in data.queries.texts]
    asked = Dataset(data.name, data.queries.texts, described, histories)
    vectors, present, _ = _encoded("text", asked, device, None, cache)
    of_event = data.queries.of_event
    return replace(histories, queries=np.where(present[of_event], of_event, -1), query_vectors=vectors)


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
        "searches": searches,
    }
    if name == "searches" and histories.queries is None:
        raise UserError("the split searches asks by queries, and no interaction has one")
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
    subject: Subject,
    histories: Histories,
    cut: Split,
    seeds: Sequence[int],
    directory: Path,
    *,
    progress: bool,
    world: World,
    start: Start | None = None,
) -> Trained:
    results = [
        _trained(
            replace(subject, config=replace(subject.config, seed=seed)), histories, cut, directory / f"seed-{seed}",
            progress=progress, world=world, start=start,
        )
        for seed in seeds
    ]  # fmt: skip
    scorers = [TowersScorer(result.evaluated, softness=subject.config.softness) for result in results]
    return Trained(results, scorers, [rank(scorer, cut.test, len(subject.catalogue)) for scorer in scorers])


def _trained(
    subject: Subject,
    histories: Histories,
    cut: Split,
    directory: Path,
    *,
    progress: bool,
    world: World,
    start: Start | None = None,
) -> TrainResult:
    catalogue, config = subject.catalogue, subject.config
    given: Any = {"progress": progress, "world": world, "live": subject.live, "start": start}
    if cut.name == "refit":
        strict = train(catalogue, histories, config, directory=directory / "strict", **given)
        kappa = strict.metrics.get("kappa", config.kappa)
        config = replace(config, epochs=max(1, strict.best_epoch), kappa=kappa)
    return train(catalogue, histories, config, directory=directory, split=cut, **given)


def _documents(data: Dataset) -> list[list[str]]:
    found = [item_tokens(row["title"], row["description"], row["attributes"]) for row in data.items]
    return found + [[] for _ in range(len(data.item_ids) - len(found))]


def _keep_ranks(directory: Path, test: Questions, ranks_SQ: torch.Tensor) -> None:
    wanted = {"targets": torch.from_numpy(test.targets), "lengths": torch.from_numpy(test.histories.lengths)}
    checkpoint.write_tensors(directory / _RANKS, {"ranks": ranks_SQ, **wanted})


def _kept_ranks(directory: Path, test: Questions) -> torch.Tensor:
    """Ranks [S, Q] of another run. Raises UserError where its questions were others."""
    if not (directory / _RANKS).is_file():
        raise UserError(f"{directory}: no {_RANKS}; name the folder that another experiment was written into (--into)")
    kept = checkpoint.read_tensors(directory / _RANKS)
    if not torch.equal(kept["targets"], torch.from_numpy(test.targets)) or not torch.equal(
        kept["lengths"], torch.from_numpy(test.histories.lengths)
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
    name: str, data: Dataset, device: str, images: Path | None, cache: Path | None = None
) -> tuple[FloatArray, BoolArray, str]:
    """(rows [V, dim], present [V], the encoder's revision) of one modality; items without it have zero rows."""
    contents, size = _contents(name, data, images), len(data.item_ids)
    there = np.flatnonzero([content is not None for content in contents])
    encoder = _encoder(name, data, device)
    kept = cache / f"{name}-{_cache_key(encoder.revision, contents, size)}.safetensors" if cache else None
    if kept is not None and kept.is_file():
        found_before = checkpoint.read_tensors(kept)
        return found_before["embeddings"].numpy(), found_before["present"].numpy(), encoder.revision
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
    return embeddings, present, encoder.revision


def _contents(name: str, data: Dataset, images: Path | None) -> list[Any]:
    """What the items of the catalogue have of a modality, None where nothing."""
    record = modality(name)
    items = [_pictured(images, row) for row in data.items] if record.is_file else data.items
    return [record.content(row) for row in items] + [None] * (len(data.item_ids) - len(items))


def _encoder(name: str, data: Dataset, device: str) -> ContentEncoder[Any]:
    return CONTENT_ENCODERS[name](device=device, model=_model(modality(name), data))


def _live(data: Dataset, modalities: Sequence[str], device: str, images: Path | None) -> dict[str, Live]:
    """The encoders that can be trained, each with its contents. Raises UserError when there is none."""
    encoders = {name: _encoder(name, data, device) for name in modalities}
    return live_of(encoders, {name: _contents(name, data, images) for name in modalities})


def _cache_key(revision: str, contents: Sequence[Any], size: int) -> str:
    """Names encoded content by encoder and contents; a picture counts by its path, size and time of change."""
    told = [
        f"{content}:{content.stat().st_size}:{content.stat().st_mtime_ns}"
        if isinstance(content, Path)
        else str(content)
        for content in contents
    ]
    return digest([revision, str(size), *told])


def _model(record: Modality, data: Dataset) -> str:
    named = (row[record.model_column] for row in data.items if record.model_column and row[record.model_column])
    return next(named, data.encoders.get(record.name, DEFAULT))


def _pictured(images: Path | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """The item with the file of its image, where there is one inside the folder."""
    if images is None or not images.is_dir():
        raise UserError(f"experiment: images need the folder that holds them (--images DIR); {images} is none")
    name = row["image"]
    path = (images / name).resolve() if name else None
    found = path is not None and path.is_relative_to(images.resolve()) and path.is_file()
    # Nobody asks an experiment whether a file changed: the name stands for its hash.
    return {**row, "image_path": path, "image_sha256": name} if found else dict(row)

"""From a training set to a checkpoint: a folder named by everything that decides its content, so that the same never
trains twice and a killed run finds its own state again."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from encoders.catalogue import Catalogue, Histories
from encoders.config import TowersConfig, TrainConfig, changed
from encoders.presets import preset
from encoders.training import checkpoint
from pipelines.generation.training_set import TrainingSet
from polytower.errors import UserError
from polytower.files import private_folder
from polytower.settings import settings

if TYPE_CHECKING:
    from encoders.training.train import Epoch

_IDS, _EVENTS, _SUMMARY = "snapshot.json", "snapshot.safetensors", "summary.json"
# The strict model's weights, where the folder's own were fitted again on all events.
EVALUATED = "evaluated"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint folder.

    sha256: of the tower weights. encoders: modality -> revision it was trained with. metrics: of the validation items.
    curves: one entry per epoch (loss, seconds, validation metrics where due). reused: found, not trained. options: what
    differed from the preset.
    """

    directory: Path
    sha256: str
    preset: str
    encoders: Mapping[str, str]
    metrics: Mapping[str, float]
    curves: list[dict[str, Any]]
    best_epoch: int
    seconds: float
    reused: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def towers(self) -> TowersConfig:
        """The shape of the towers, which says what they read."""
        return checkpoint.towers_config(self.directory)


def train_checkpoint(
    training_set: TrainingSet,
    preset_name: str,
    root: Path,
    *,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    progress: bool = False,
    on_epoch: "Callable[[Epoch], None] | None" = None,
) -> Checkpoint:
    """Trains the preset's towers below `root`, or finds them there; a run that was killed goes on where it was.

    options: what differs from the preset (`config.changed`).
    """
    config = changed(preset(preset_name), options or {})
    # Who did nothing teaches nothing: such a user's coming is no reason to train again.
    training_set = replace(training_set, histories=training_set.histories.active())
    directory = root / _key(training_set, config)
    if (directory / _SUMMARY).is_file():
        return read_checkpoint(directory)
    from dataclasses import asdict

    from encoders.training.train import train

    # The snapshot names all users.
    private_folder(private_folder(root) / directory.name)
    _write_snapshot(directory, training_set)
    result = train(
        training_set.catalogue, training_set.histories, replace(config, device=device),
        directory=directory, progress=progress, on_epoch=on_epoch,
    )  # fmt: skip
    if config.refit:
        checkpoint.save(directory / EVALUATED, result.evaluated, config, training_set.catalogue, metrics=result.metrics)
    # Written last: a folder with a summary is complete.
    checkpoint.write_json(
        directory / _SUMMARY,
        {
            "preset": preset_name,
            "options": dict(options or {}),
            "encoders": dict(training_set.encoders),
            "metrics": result.metrics,
            "curves": [asdict(point) for point in result.curves],
            "best_epoch": result.best_epoch,
            "seconds": result.seconds,
        },
    )
    return _read(directory, reused=False)


def read_checkpoint(directory: Path) -> Checkpoint:
    """A finished checkpoint folder. Raises UserError when it is absent or unfinished."""
    return _read(directory, reused=True)


def located(recorded: str | None) -> Path | None:
    """A checkpoint's folder by the path that was recorded when it was trained; None where it is not on this machine.

    A home that was moved or copied has it under the same name, which its content decides.
    """
    if not recorded:
        return None
    here = settings().checkpoints_dir / Path(recorded).name
    return next((folder for folder in (Path(recorded), here) if folder.is_dir()), None)


def read_snapshot(directory: Path) -> tuple[list[str], Histories]:
    """(item ids in catalogue order, histories) that a checkpoint was trained on."""
    ids = checkpoint.read_json(directory / _IDS)
    events = {name: tensor.numpy() for name, tensor in checkpoint.read_tensors(directory / _EVENTS).items()}
    return ids["items"], Histories(ids["users"], **events)


def aligned(catalogue: Catalogue, item_ids: list[str]) -> Catalogue:
    """The catalogue cut down to `item_ids`, in their order.

    Raises UserError when one of them is gone: the embeddings of a checkpoint cannot be told without it.
    """
    index = {item_id: row for row, item_id in enumerate(catalogue.item_ids)}
    missing = [item_id for item_id in item_ids if item_id not in index]
    if missing:
        raise UserError(f"{len(missing)} items of the checkpoint are no longer in the database, such as {missing[0]!r}")
    rows = np.array([index[item_id] for item_id in item_ids], np.int64)
    return Catalogue(
        item_ids,
        {name: vectors[rows] for name, vectors in catalogue.content.items()},
        {name: found[rows] for name, found in catalogue.present.items()},
    )


def _read(directory: Path, *, reused: bool) -> Checkpoint:
    summary = checkpoint.read_json(directory / _SUMMARY)
    weights = hashlib.sha256((directory / "towers.safetensors").read_bytes()).hexdigest()
    return Checkpoint(directory, weights, reused=reused, **summary)


def _key(training_set: TrainingSet, config: TrainConfig) -> str:
    digest = hashlib.sha256()
    digest.update(training_set.catalogue.fingerprint().encode())
    digest.update(training_set.histories.fingerprint(*config.towers.reads).encode())
    # An item whose content changed has new vectors under the old revision.
    for name, vectors in sorted(training_set.catalogue.content.items()):
        digest.update(name.encode() + vectors.tobytes())
    digest.update(json.dumps([dict(training_set.encoders), config.as_json()], sort_keys=True).encode())
    return f"{config.preset}-{digest.hexdigest()[:16]}"


def _write_snapshot(directory: Path, training_set: TrainingSet) -> None:
    import torch

    histories = training_set.histories
    checkpoint.write_json(directory / _IDS, {"items": training_set.catalogue.item_ids, "users": histories.user_ids})
    beside = [name for name in ("attributes", "queries", "query_vectors") if getattr(histories, name) is not None]
    names = ("offsets", "items", "times", *beside)
    events = {name: torch.from_numpy(getattr(histories, name)) for name in names}
    checkpoint.write_tensors(directory / _EVENTS, events)

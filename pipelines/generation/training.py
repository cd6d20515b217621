"""From a training set to a checkpoint: a folder named by everything that decides its content, so that the same never
trains twice and a killed run finds its own state again."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from encoders.catalogue import Catalogue, Histories
from encoders.config import TowersConfig, TrainConfig, changed
from encoders.content.encoder import ContentEncoder
from encoders.presets import preset
from encoders.training import checkpoint
from encoders.training.start import SUMMARY, read_start
from pipelines.generation.training_set import TrainingSet
from polytower import locks
from polytower.errors import UserError
from polytower.files import private_folder
from polytower.settings import settings

if TYPE_CHECKING:
    from encoders.towers.adapted import Live
    from encoders.training.train import Epoch

# modality -> its encoder, newly loaded: training and adapters change it in place
Load = Callable[[str], ContentEncoder[Any]]

_IDS, _EVENTS, _SUMMARY = "snapshot.json", "snapshot.safetensors", SUMMARY
# The strict model's weights, where the folder's own were fitted again on all events.
EVALUATED = "evaluated"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint folder.

    sha256: of the tower weights. encoders: modality -> revision it was trained with. metrics: of the validation items.
    curves: one entry per epoch (loss, seconds, validation metrics where due). reused: found, not trained. options: what
    differed from the preset. trained_before: moment from which on no event was known, as ISO text; None knew all.
    start: folder of the model that it went on from, None where it began anew. told: what of the catalogue that model
    does without.
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
    trained_before: str | None = None
    start: str | None = None
    told: Sequence[str] = ()

    @property
    def before(self) -> datetime | None:
        """`trained_before` as a time."""
        return None if self.trained_before is None else datetime.fromisoformat(self.trained_before)

    @property
    def adapters(self) -> dict[str, str]:
        """modality -> revision of the encoder that training adapted; {} where all stayed frozen."""
        return checkpoint.adapters(self.directory)

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
    load: Load | None = None,
    start: Path | None = None,
) -> Checkpoint:
    """Trains the preset's towers below `root`, or finds them there; a run that was killed goes on where it was.

    options: what differs from the preset (`config.changed`). load: a modality's encoder, for presets that train them
    too. start: folder of a model to go on from (`read_start`). Raises UserError where there is no encoder to train.
    """
    config = changed(preset(preset_name), options or {})
    # Who did nothing teaches nothing: such a user's coming is no reason to train again.
    training_set = replace(training_set, histories=training_set.histories.active())
    began = None if start is None else _sha256(start)
    # The snapshot names all users: the folder is nobody else's to read.
    directory = private_folder(private_folder(root) / _key(training_set, config, began))
    # Another run of this recipe waits here, and finds what the first one has finished.
    with locks.folder(directory):
        if (directory / _SUMMARY).is_file():
            return read_checkpoint(directory)
        _train(
            training_set, config, directory, options or {},
            device=device, progress=progress, on_epoch=on_epoch, load=load, start=start,
        )  # fmt: skip
    return _read(directory, reused=False)


def _train(
    training_set: TrainingSet,
    config: TrainConfig,
    directory: Path,
    options: Mapping[str, Any],
    *,
    device: str,
    progress: bool,
    on_epoch: "Callable[[Epoch], None] | None",
    load: Load | None,
    start: Path | None,
) -> None:
    from dataclasses import asdict

    from encoders.training.train import train

    begin, told = (None, []) if start is None else read_start(start, training_set.catalogue, training_set.encoders)
    _write_snapshot(directory, training_set)
    result = train(
        training_set.catalogue, training_set.histories, replace(config, device=device),
        directory=directory, progress=progress, on_epoch=on_epoch, start=begin,
        live=_live(training_set, load) if config.lora_rank and load else None,
    )  # fmt: skip
    if config.refit:
        checkpoint.save(directory / EVALUATED, result.evaluated, config, training_set.catalogue, metrics=result.metrics)
    # Written last: a folder with a summary is complete.
    checkpoint.write_json(
        directory / _SUMMARY,
        {
            "preset": config.preset,
            "options": dict(options),
            "encoders": dict(training_set.encoders),
            "metrics": result.metrics,
            "curves": [asdict(point) for point in result.curves],
            "best_epoch": result.best_epoch,
            "seconds": result.seconds,
            "trained_before": training_set.before and training_set.before.isoformat(),
            "start": None if start is None else str(start),
            "told": told,
        },
    )


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
    """The catalogue of exactly `item_ids`, in their order. An item that is gone from the database has no content."""
    index = {item_id: row for row, item_id in enumerate(catalogue.item_ids)}
    rows = np.array([index.get(item_id, -1) for item_id in item_ids], np.int64)
    there = rows >= 0
    return Catalogue(
        item_ids,
        {name: np.where(there[:, None], vectors[rows], 0) for name, vectors in catalogue.content.items()},
        {name: found[rows] & there for name, found in catalogue.present.items()},
    )


def forget_in_snapshots(entity: Literal["user", "item"], entity_id: str) -> int:
    """Takes a user's events, or an item's and its name, out of all checkpoints of this machine; answers of how many.

    An item keeps its row, under another name: the weights are by row.
    """
    changed = 0
    for path in sorted(settings().checkpoints_dir.glob(f"*/{_IDS}")):
        item_ids, histories = read_snapshot(path.parent)
        names = histories.user_ids if entity == "user" else item_ids
        if entity_id not in names:
            continue
        place = names.index(entity_id)
        if entity == "user":
            histories = histories.select(np.delete(np.arange(len(histories)), place))
        else:
            histories = histories.keep(histories.items != place)
            item_ids = [*item_ids[:place], f"forgotten {path.parent.name} {place}", *item_ids[place + 1 :]]
        _write(path.parent, item_ids, histories)
        if entity == "item":
            for folder in (path.parent, path.parent / EVALUATED):
                checkpoint.rename_catalogue(folder, Catalogue(item_ids))
        changed += 1
    return changed


def _read(directory: Path, *, reused: bool) -> Checkpoint:
    summary = checkpoint.read_json(directory / _SUMMARY)
    return Checkpoint(directory, _sha256(directory), reused=reused, **summary)


def _sha256(directory: Path) -> str:
    return hashlib.sha256(checkpoint.read_bytes(directory)).hexdigest()


def _key(training_set: TrainingSet, config: TrainConfig, start: str | None) -> str:
    digest = hashlib.sha256()
    digest.update(training_set.catalogue.fingerprint().encode())
    digest.update(training_set.histories.fingerprint(*config.towers.reads).encode())
    # An item whose content changed has new vectors under the old revision.
    for name, vectors in sorted(training_set.catalogue.content.items()):
        digest.update(name.encode() + vectors.tobytes())
    digest.update(json.dumps([dict(training_set.encoders), config.as_json()], sort_keys=True).encode())
    if training_set.before is not None:  # towers that know all there is are others' equals, but not so recorded
        digest.update(training_set.before.isoformat().encode())
    digest.update((start or "").encode())
    return f"{config.preset}-{digest.hexdigest()[:16]}"


def _live(training_set: TrainingSet, load: Load) -> "dict[str, Live]":
    from encoders.towers.adapted import live_of

    encoders = {name: load(name) for name in training_set.contents}
    for name, encoder in encoders.items():
        if encoder.revision != training_set.encoders[name]:
            raise UserError(
                f"training: the items' {name} was encoded by revision {training_set.encoders[name]}, and the encoder"
                f" that is set is {encoder.model}, revision {encoder.revision}; `polytower materialize` encodes anew"
            )
    return live_of(encoders, training_set.contents)


def _write_snapshot(directory: Path, training_set: TrainingSet) -> None:
    _write(directory, training_set.catalogue.item_ids, training_set.histories)


def _write(directory: Path, item_ids: list[str], histories: Histories) -> None:
    import torch

    checkpoint.write_json(directory / _IDS, {"items": item_ids, "users": histories.user_ids})
    beside = [name for name in ("attributes", "queries", "query_vectors") if getattr(histories, name) is not None]
    names = ("offsets", "items", "times", *beside)
    events = {name: torch.from_numpy(getattr(histories, name)) for name in names}
    checkpoint.write_tensors(directory / _EVENTS, events)

"""Checkpoints: safetensors for weights, JSON for everything else; never pickle. Files appear whole or not at all.

A checkpoint folder holds towers.safetensors and towers.json (configuration, item ids' fingerprint, metrics), and
adapter-MODALITY.safetensors for each encoder that was trained too; while training runs also state.safetensors, from
which it resumes. The item ids themselves are the database's (or the folder's): a checkpoint only refuses a catalogue
with others.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig, TrainConfig, config_from_json, towers_from_json
from encoders.content.adapters import adapted_revision
from encoders.towers.families import FAMILIES
from encoders.towers.model import Asked, Model, Reader
from polytower.errors import UserError

FORMAT = 1
_WEIGHTS, _DOCUMENT, _ADAPTER = "towers.safetensors", "towers.json", "adapter-{}.safetensors"
# The key of a document inside a safetensors file.
_INSIDE = "document"


def save(
    directory: Path,
    towers: Model,
    config: TrainConfig,
    catalogue: Catalogue,
    *,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Writes towers.safetensors and towers.json into `directory` (made if need be)."""
    document = {
        "format": FORMAT,
        "items": len(catalogue),
        "catalogue": catalogue.fingerprint(),
        "config": config.as_json(),
        "towers": _plain(towers.config),
        "metrics": dict(metrics or {}),
        "adapters": {name: adapted_revision(adapter) for name, adapter in towers.adapters.items()},
    }
    for name, adapter in towers.adapters.items():
        with _whole(directory / _ADAPTER.format(name)) as partial:
            partial.write_bytes(adapter)
    write_tensors(directory / _WEIGHTS, towers.state_dict())
    write_json(directory / _DOCUMENT, document)


def load(directory: Path, catalogue: Catalogue) -> tuple[Model, TrainConfig, dict[str, Any]]:
    """(towers, training configuration, metrics) of a checkpoint, for the catalogue it was trained on.

    The catalogue's content must be that of the adapted encoders where the checkpoint has adapters (`read_adapters`). A
    model in which no weight belongs to an item takes any catalogue. A modality that this lacks is absent then, and one
    that the model has not learned from is left out.

    Raises UserError if there is none, if it is damaged, or if it belongs to another catalogue or set of modalities.
    """
    document = read_json(directory / _DOCUMENT)
    if document.get("format") != FORMAT:
        raise UserError(f"{directory}: a checkpoint of format {document.get('format')}; this version reads {FORMAT}")
    shape = towers_from_json(document["towers"])
    family = FAMILIES[shape.family]
    if not family.by_id:
        catalogue = catalogue.reduced_to(shape.modalities)
    elif document["catalogue"] != catalogue.fingerprint():
        raise UserError(
            f"{directory}: trained on another catalogue ({document['items']} items; now {len(catalogue)}, or other "
            "ids); train again on this one, or read the checkpoint with the items it was trained on"
        )
    if shape.modalities != catalogue.modalities:
        raise UserError(
            f"{directory}: trained with content {_named(shape.modalities)}; the catalogue now has "
            f"{_named(catalogue.modalities)}; encode the missing modality, or train again"
        )
    towers = family.model(shape, catalogue)
    _fill(towers, read_tensors(directory / _WEIGHTS), str(directory))
    towers.adapters = read_adapters(directory)
    return towers.eval(), config_from_json(document["config"]), document["metrics"]


def rename_catalogue(directory: Path, catalogue: Catalogue) -> None:
    """Notes that the items of a checkpoint have other names, in the same order; nothing without a checkpoint there."""
    if (directory / _DOCUMENT).is_file():
        write_json(directory / _DOCUMENT, read_json(directory / _DOCUMENT) | {"catalogue": catalogue.fingerprint()})


def read_bytes(directory: Path) -> bytes:
    """The weights' file of a checkpoint. Raises UserError if there is none."""
    if not (directory / _WEIGHTS).is_file():
        raise UserError(f"{directory}: no checkpoint; `polytower pretrain` and `polytower materialize` write one")
    return (directory / _WEIGHTS).read_bytes()


def towers_config(directory: Path) -> TowersConfig:
    """The shape of a checkpoint's towers. Raises UserError if there is no checkpoint, or it is damaged."""
    return towers_from_json(read_json(directory / _DOCUMENT)["towers"])


def train_config(directory: Path) -> TrainConfig:
    """How the checkpoint was trained."""
    return config_from_json(read_json(directory / _DOCUMENT)["config"])


def adapters(directory: Path) -> dict[str, str]:
    """modality -> revision of the encoder with the checkpoint's adapter; {} where all encoders stayed frozen."""
    return dict(read_json(directory / _DOCUMENT).get("adapters", {}))


def read_adapters(directory: Path) -> dict[str, bytes]:
    """The adapters of a checkpoint by modality. Raises UserError for one that is absent or was changed."""
    found = {}
    for name, revision in adapters(directory).items():
        path = directory / _ADAPTER.format(name)
        found[name] = path.read_bytes() if path.is_file() else b""
        if adapted_revision(found[name]) != revision:
            raise UserError(f"{path}: is not the adapter that the checkpoint was written with; train again")
    return found


def user_tower_bytes(towers: Model) -> tuple[bytes, dict[str, Any]]:
    """The user tower alone: (safetensors bytes, JSON-able configuration)."""
    return _bytes(towers.get_submodule("user_tower"), towers.config)


def load_user_tower(weights: bytes, config: Mapping[str, Any]) -> Reader:
    """The inverse of `user_tower_bytes`, in evaluation mode on the CPU. Raises UserError if the two do not fit."""
    shape = towers_from_json(config)
    tower: Any = FAMILIES[shape.family].user_tower(shape)
    _fill(tower, _parse(weights, "user tower"), "user tower")
    found: Reader = tower.eval()
    return found


def content_tower_bytes(towers: Model) -> tuple[bytes, dict[str, Any]] | None:
    """The item tower's content path alone: (safetensors bytes, JSON-able configuration); None where there is none."""
    tower = towers.content_tower
    return None if tower is None else _bytes(tower, towers.config)


def load_content_tower(weights: bytes, config: Mapping[str, Any]) -> Asked:
    """The inverse of `content_tower_bytes`, in evaluation mode on the CPU. Raises UserError if the two do not fit."""
    shape = towers_from_json(config)
    tower: Any = FAMILIES[shape.family].content_tower(shape)
    _fill(tower, _parse(weights, "content tower"), "content tower")
    found: Asked = tower.eval()
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any] | None = None) -> None:
    """Safetensors, whole or not at all; document: JSON that belongs to exactly these tensors (`read_document`)."""
    with _whole(path) as partial:
        metadata = None if document is None else {_INSIDE: json.dumps(document)}
        safetensors.torch.save_file(_contiguous(tensors), partial, metadata)


def read_document(path: Path) -> dict[str, Any] | None:
    """The JSON that a safetensors file was written with; None without a file, or in one that has none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            inside = (file.metadata() or {}).get(_INSIDE)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); remove the folder and train again") from error
    return None if inside is None else dict(json.loads(inside))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises UserError if it is absent or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; train first (polytower materialize)")
    return _parse(path.read_bytes(), str(path))


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """JSON, whole or not at all."""
    with _whole(path) as partial:
        partial.write_text(json.dumps(document, indent=1))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which then takes its place: also after a power cut it is the old or the new.

    Raises UserError where it cannot be written; what was there before stays.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path} cannot be written: {reason}; free some space (or make the folder writable) and run the same "
            "command again: what was finished before is kept"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is absent or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; train first (polytower materialize)")
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove the folder and train again") from error
    return document


def as_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as it will be after a round trip through JSON: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain


def _parse(weights: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(weights)
    except SafetensorError as error:
        raise UserError(f"{where}: damaged weights ({error}); train again") from error


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise UserError(f"{where}: weights of another configuration: {error}") from error


def _bytes(module: nn.Module, config: TowersConfig) -> tuple[bytes, dict[str, Any]]:
    return safetensors.torch.save(_contiguous(module.state_dict())), _plain(config)


def _plain(config: TowersConfig) -> dict[str, Any]:
    return as_json(asdict(config))


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _named(modalities: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{name} ({width})" for name, width in modalities) or "none"

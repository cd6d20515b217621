"""Pretraining over the items of one or several folders, without a database: what `--start` goes on from."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from encoders.catalogue import Catalogue, Histories, digest
from encoders.config import changed
from encoders.experiments.experiment import Dataset, encoded
from encoders.presets import preset
from encoders.training import checkpoint
from encoders.training.checks import check_content, check_family, check_names
from encoders.training.masked import described
from encoders.training.start import SUMMARY
from encoders.training.train import pretrained, train
from polytower.errors import UserError


def pretrain(
    sets: Sequence[Dataset],
    preset_name: str,
    directory: Path,
    *,
    modalities: Sequence[str],
    images: Sequence[Path] = (),
    sequences: bool = False,
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    cache: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains the preset's model on all items of the sets, and with `sequences` on their histories; JSON-able.

    directory: receives towers.safetensors, towers.json and summary.json, is resumed from after a kill, and found again
    when it is finished. modalities: content to encode; one that no item has is told and left out. images: the folder of
    pictures of each set. Raises UserError for a folder that holds another pretraining, and as `train` does.
    """
    started = time.perf_counter()
    config = changed(replace(preset(preset_name), device=device), options or {})
    check_names(config)
    check_family(config, starts=False)
    if not config.pretrain_epochs:
        raise UserError(f"pretrain: the preset {preset_name} has no epochs of its own for this (pretrain_epochs)")
    pictures: list[Path | None] = [*images] or [None] * len(sets)
    found = [
        encoded(data, modalities, device=device, images=folder, cache=cache)
        for data, folder in zip(sets, pictures, strict=True)
    ]
    encoders = _agreed([revisions for _, revisions in found], [data.name for data in sets])
    catalogue = _union([one for one, _ in found])
    told = [
        f"no item has {name}: the model does not learn from it" for name in encoders if name not in catalogue.content
    ]
    encoders = {name: revision for name, revision in encoders.items() if name in catalogue.content}
    check_content(config, catalogue)
    known = described(catalogue)
    if not known.all():
        told.append(f"{int((~known).sum())} of {len(catalogue)} items have no content and are left out")
    histories = _together([data.histories for data in sets], [len(one) for one, _ in found])
    read = (histories.items, histories.offsets) if sequences else ()
    content = [rows for _, rows in sorted(catalogue.content.items())]
    identity = digest([str(replace(config, device="", threads=None))], catalogue.item_ids, *content, *read)
    report = {
        "directory": str(directory), "preset": preset_name, "options": dict(options or {}), "identity": identity,
        "data": [data.name for data in sets], "items": len(catalogue), "encoders": encoders, "sequences": sequences,
        "told": told,
    }  # fmt: skip
    if (directory / SUMMARY).is_file():
        before = checkpoint.read_json(directory / SUMMARY)
        if before.get("identity") != identity:
            raise UserError(f"{directory}: holds another pretraining; name a new folder, or remove this one")
        return before | {"reused": True}
    if sequences:
        result = train(catalogue, histories, config, directory=directory, progress=progress)
        curves, metrics = result.curves, result.metrics
    else:
        run = pretrained(catalogue, config, directory=directory, progress=progress)
        curves, metrics = run.curves, {}
        checkpoint.save(directory, run.finish(), config, catalogue)
        run.forget()
    losses = [point.loss for point in curves]
    report |= {"losses": losses, "loss": losses[-1], "metrics": metrics, "seconds": time.perf_counter() - started}
    checkpoint.write_json(directory / SUMMARY, report)  # last: a folder with a summary is complete
    return report | {"reused": False}


def _agreed(found: Sequence[Mapping[str, str]], names: Sequence[str]) -> dict[str, str]:
    """The revision of each modality's encoder. Raises UserError where two sets have another one."""
    agreed = dict(found[0])
    for revisions, name in zip(found, names, strict=True):
        for modality, revision in revisions.items():
            if agreed[modality] != revision:
                raise UserError(
                    f"pretrain: {names[0]} and {name} have {modality} of different encoders "
                    f"({agreed[modality]}, {revision}); vectors of two encoders do not mix"
                )
    return agreed


def _union(catalogues: Sequence[Catalogue]) -> Catalogue:
    """All items, called by their set's number and their id; without modalities that none of them has."""
    ids = [f"{number}:{item_id}" for number, one in enumerate(catalogues) for item_id in one.item_ids]
    names = [name for name in catalogues[0].content if any(one.present[name].any() for one in catalogues)]
    return Catalogue(
        ids,
        {name: np.concatenate([one.content[name] for one in catalogues]) for name in names},
        {name: np.concatenate([one.present[name] for one in catalogues]) for name in names},
    )


def _together(found: Sequence[Histories], sizes: Sequence[int]) -> Histories:
    """The histories of all users over the catalogue of `_union`. sizes: items of each set."""
    before = np.cumsum([0, *sizes[:-1]])
    lengths = np.concatenate([histories.lengths for histories in found])
    return Histories(
        [f"{number}:{user}" for number, histories in enumerate(found) for user in histories.user_ids],
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([histories.items + offset for histories, offset in zip(found, before, strict=True)]),
        np.concatenate([histories.times for histories in found]),
    )

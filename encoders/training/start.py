"""Where training starts: IDs and the linear map of content from co-occurrence, or the weights of earlier towers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from encoders.catalogue import Catalogue, Histories
from encoders.closed_form import ridge, whitening
from encoders.config import TrainConfig
from encoders.cooccurrence import ppmi_vectors, smoothed
from encoders.towers.content_tower import Features
from encoders.towers.families import FAMILIES
from encoders.towers.mmsrec import MMSRec
from encoders.towers.model import Model
from encoders.towers.towers import Towers
from encoders.training import checkpoint, hashed_rows
from encoders.training.cold import features_of
from polytower.errors import UserError

# Beside the weights of a finished checkpoint: preset, encoders (modality → revision), curves.
SUMMARY = "summary.json"
# towers to go on from, and the item ids of their catalogue in order
Start = tuple[Model, Sequence[str]]


def read_start(directory: Path, catalogue: Catalogue, encoders: Mapping[str, str]) -> tuple[Start, list[str]]:
    """(a model that knows no items, to go on from; what of the catalogue's modalities it does without, in words).

    directory: written by `polytower pretrain`, or a checkpoint. encoders: modality → revision, the catalogue's. Raises
    UserError for a model that belongs to the items it was trained on, for one that learned from other encoders, and for
    one that can read nothing of this catalogue.
    """
    shape = checkpoint.towers_config(directory)
    if FAMILIES[shape.family].by_id:
        raise UserError(
            f"{directory}: {shape.family} belong to the items that they were trained on; what can start elsewhere is "
            "made by `polytower pretrain` (preset mmsrec)"
        )
    learned = checkpoint.read_json(directory / SUMMARY)["encoders"]
    known = [name for name, _ in shape.modalities]
    for name in known:
        if name in encoders and encoders[name] != learned[name]:
            raise UserError(
                f"{directory}: learned from {name} by the encoder revision {learned[name]}; this catalogue's is "
                f"{encoders[name]}: set the encoder that it was pretrained with, or pretrain with the one that is set"
            )
    if not {*known} & {*encoders}:
        raise UserError(f"{directory}: reads {', '.join(known)}; this catalogue has {', '.join(encoders) or 'nothing'}")
    told = [f"no item has {name}, which the model has learned from" for name in known if name not in encoders]
    told += [f"{name} is left out: the model has not learned from it" for name in encoders if name not in known]
    model, _, _ = checkpoint.load(directory, catalogue)
    return (model, catalogue.item_ids), told


def initial_towers(catalogue: Catalogue, train: Histories, config: TrainConfig) -> Towers:
    """Towers with PPMI-SVD ID embeddings (or normal ones) and the training counts of each item."""
    counts, shape = train.counts(len(catalogue)), config.towers
    taken = None
    if shape.tail_buckets:
        taken = hashed_rows.places(counts, shape.tail_buckets, shape.tail_below)
        shape = replace(shape, own_rows=int((counts >= shape.tail_below).sum()))
    towers = Towers(shape, catalogue)
    towers.item_tower.counts.copy_(torch.from_numpy(counts))
    if taken is not None:
        towers.item_tower.places.copy_(torch.from_numpy(taken))
    if config.initial == "svd":
        vectors = ppmi_vectors(train, len(catalogue), shape.id_dim, config.seed)
        if config.smooth_initial > 0 and catalogue.content:
            content = np.concatenate([catalogue.content[name] for name, _ in catalogue.modalities], axis=1)
            vectors = smoothed(vectors, counts, content, config.smooth_initial)
        if taken is not None:
            vectors = hashed_rows.gathered(vectors, taken, len(towers.item_tower.table))
        towers.item_tower.table.data.copy_(torch.from_numpy(vectors))
    if towers.item_tower.content is not None:
        start_content(towers, catalogue, train, config)
    return towers


def start_content(towers: Towers, catalogue: Catalogue, train: Histories, config: TrainConfig) -> None:
    """Whitens the features on the catalogue, and starts the linear map as a ridge to the PPMI-SVD rows; in place."""
    content, counts = towers.item_tower.content, train.counts(len(catalogue))
    assert content is not None
    _whiten(content.features, catalogue)
    if content.linear is not None and config.initial == "svd":
        features = features_of(towers)
        weights = np.log1p(counts) * (features != 0).any(axis=1)
        target = ppmi_vectors(train, len(catalogue), content.linear.out_features, config.seed)
        target /= np.linalg.norm(target, axis=1, keepdims=True)
        solved = ridge(features, target, weights, config.ridge * float(weights[weights > 0].mean()))
        content.linear.weight.data.copy_(torch.from_numpy(solved.T))


def _whiten(features: Features, catalogue: Catalogue) -> None:
    for name in features.whitened:
        rank = features.widths[name]
        mean, basis = whitening(catalogue.content[name], catalogue.present[name], rank)
        features.get_buffer(f"mean_{name}").copy_(torch.from_numpy(mean))
        features.get_buffer(f"basis_{name}").copy_(torch.from_numpy(basis))


def initial_encoder(catalogue: Catalogue, train: Histories, config: TrainConfig) -> MMSRec:  # noqa: ARG001 (as above)
    """MMSRec near the identity, or with random weights, and the catalogue's whitening where there is one."""
    model = MMSRec(config.towers, catalogue)
    if config.initial == "identity":
        model.user_tower.start_near_identity()
    _whiten(model.user_tower.features, catalogue)
    return model


# What may differ between a model and what it goes on from: nothing of it is in the weights.
_FREE = ("dropout", "content_dropout")


def take_over(model: Model, start: Start, catalogue: Catalogue) -> None:  # noqa: ARG001 (as below)
    """Takes over all weights of `start`, in place. Raises UserError, saying what, if it has another shape."""
    earlier, _ = start
    theirs, ours = asdict(earlier.config), asdict(model.config)
    differing = [
        f"{name} is {theirs[name]}, not {ours[name]}"
        for name in ours
        if name not in _FREE and theirs[name] != ours[name]
    ]
    if differing:
        raise UserError(
            f"training cannot go on from a model of another shape: its {'; its '.join(differing)}; give the options "
            "that it was pretrained with (--option towers.NAME=VALUE)"
        )
    model.load_state_dict(earlier.state_dict())


def go_on_from(towers: Towers, start: Start, catalogue: Catalogue) -> None:
    """Takes over the weights of `start`, in place; items that it never trained on keep their present ID row.

    Raises UserError if the towers have another shape.
    """
    earlier, item_ids = start
    if not isinstance(earlier, Towers):
        raise UserError(f"training cannot go on from a model of the family {earlier.config.family}; start anew")
    if earlier.config.tail_buckets:
        raise UserError("training cannot go on from towers whose rare items share rows (tail_buckets); start anew")
    if earlier.config != towers.config:
        raise UserError("training cannot go on from towers of another configuration or other modalities; start anew")
    moved = earlier.over(item_ids, catalogue).state_dict()
    known = moved.pop("item_tower.counts") > 0
    moved["item_tower.table"] = torch.where(known[:, None], moved["item_tower.table"], towers.item_tower.table.detach())
    towers.load_state_dict(moved, strict=False)

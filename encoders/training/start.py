"""Where training starts: IDs and the linear map of content from co-occurrence, or the weights of earlier towers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from encoders.catalogue import Catalogue, Histories
from encoders.closed_form import ridge, whitening
from encoders.config import TrainConfig
from encoders.cooccurrence import ppmi_vectors, smoothed
from encoders.towers.towers import Towers, over
from encoders.training import hashed_rows
from encoders.training.cold import features_of
from polytower.errors import UserError

# towers to go on from, and the item ids of their catalogue in order
Start = tuple[Towers, Sequence[str]]


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
    for name in content.features.whitened:
        rank = content.features.widths[name]
        mean, basis = whitening(catalogue.content[name], catalogue.present[name], rank)
        content.features.get_buffer(f"mean_{name}").copy_(torch.from_numpy(mean))
        content.features.get_buffer(f"basis_{name}").copy_(torch.from_numpy(basis))
    if content.linear is not None and config.initial == "svd":
        features = features_of(towers)
        weights = np.log1p(counts) * (features != 0).any(axis=1)
        target = ppmi_vectors(train, len(catalogue), content.linear.out_features, config.seed)
        target /= np.linalg.norm(target, axis=1, keepdims=True)
        solved = ridge(features, target, weights, config.ridge * float(weights[weights > 0].mean()))
        content.linear.weight.data.copy_(torch.from_numpy(solved.T))


def go_on_from(towers: Towers, start: Start, catalogue: Catalogue) -> None:
    """Takes over the weights of `start`, in place; items that it never trained on keep their present ID row.

    Raises UserError if the towers have another shape.
    """
    earlier, item_ids = start
    if earlier.config.tail_buckets:
        raise UserError("training cannot go on from towers whose rare items share rows (tail_buckets); start anew")
    if earlier.config != towers.config:
        raise UserError("training cannot go on from towers of another configuration or other modalities; start anew")
    moved = over(earlier, item_ids, catalogue).state_dict()
    known = moved.pop("item_tower.counts") > 0
    moved["item_tower.table"] = torch.where(known[:, None], moved["item_tower.table"], towers.item_tower.table.detach())
    towers.load_state_dict(moved, strict=False)

"""How each family is taught: where it starts, what a step is made of, and what the step minimises."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from encoders.catalogue import Catalogue, Histories
from encoders.config import TrainConfig
from encoders.towers.model import Model
from encoders.training import contrast, masked, objective, packing, search_unit, start


@dataclass(frozen=True)
class Recipe:
    """initial: the untrained model. go_on: takes over earlier weights, in place. rows: one epoch's, drawn from a
    generator. step: how many of them a step has. batches: the steps, of which a process gets its share; each has
    targets (what its loss is the mean over) and users. loss: (ranking loss, detached; total) of a step.
    """

    initial: Callable[[Catalogue, Histories, TrainConfig], Model]
    go_on: Callable[..., None]
    rows: Callable[..., Any]
    step: Callable[[TrainConfig], int]
    batches: Callable[..., Any]
    loss: Callable[..., Any]


RECIPES = {
    "towers": Recipe(
        start.initial_towers, start.go_on_from, packing.rows, lambda config: config.batch_rows, packing.batches,
        objective.batch_loss,
    ),
    "mmsrec": Recipe(
        start.initial_encoder, start.take_over, masked.rows, lambda config: config.batch_rows, masked.batches,
        masked.loss,
    ),
}  # fmt: skip

# before the histories, and without them
PRETRAINING = {
    "mmsrec": Recipe(
        start.initial_encoder, start.take_over, contrast.rows, lambda config: config.pretrain_items, contrast.batches,
        contrast.loss,
    ),
}  # fmt: skip

# before the training of towers that read queries, on the same histories; and what starts from its tables
SEARCH_UNIT = replace(RECIPES["towers"], loss=search_unit.unit_loss)
AFTER_UNIT = replace(RECIPES["towers"], go_on=search_unit.restore)

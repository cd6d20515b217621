"""Controls of an experiment: the same run with one thing taken away, which shows what a gain comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from encoders.catalogue import Catalogue
from encoders.config import TrainConfig
from encoders.towers.adapted import Live
from encoders.towers.families import FAMILIES
from polytower.errors import UserError


@dataclass(frozen=True, eq=False)
class Subject:
    """What is trained: the catalogue, how, and the encoders that are trained too."""

    catalogue: Catalogue
    config: TrainConfig
    live: Mapping[str, Live]


def control(name: str, subject: Subject) -> Subject:
    """The control of that name. Raises UserError for an unknown one, and for a run without content."""
    if name not in CONTROLS:
        raise UserError(f"no control {name!r}; there are {', '.join(CONTROLS)}")
    if not subject.catalogue.modalities:
        raise UserError(f"the control {name} compares with a run that has content; name it with --content")
    return CONTROLS[name](subject)


def equal_width(subject: Subject) -> Subject:
    """IDs alone, in as many dimensions: what width gives by itself."""
    if not FAMILIES[subject.config.towers.family].by_id:
        raise UserError(f"the control equal_width is of IDs alone, and {subject.config.towers.family} has none")
    towers = replace(
        subject.config.towers, content_dim=0, cold="content", id_dropout=0.0, shrinkage=0.0, contrast_dim=0
    )
    config = replace(subject.config, towers=towers, lora_rank=0)
    return Subject(Catalogue(subject.catalogue.item_ids), config, {})


def permuted(subject: Subject) -> Subject:
    """Every item has the content of another one: what content gives that says nothing."""
    catalogue = subject.catalogue
    order = np.random.default_rng(0).permutation(len(catalogue))
    content = {name: rows[order] for name, rows in catalogue.content.items()}
    present = {name: found[order] for name, found in catalogue.present.items()}
    live = {
        name: replace(one, contents=[one.contents[item] for item in order.tolist()])
        for name, one in subject.live.items()
    }
    return Subject(Catalogue(catalogue.item_ids, content, present), subject.config, live)


def frozen(subject: Subject) -> Subject:
    """The encoders stay as they are: what training them gives."""
    return replace(subject, config=replace(subject.config, lora_rank=0), live={})


CONTROLS = {"equal_width": equal_width, "permuted": permuted, "frozen": frozen}

"""What is trained: a preset with options, asked for by name, or else that of the generation that serves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg

from encoders.config import TrainConfig, changed
from encoders.presets import preset
from pipelines.generation import lifecycle
from polytower.errors import UserError

DEFAULT = "demo"


@dataclass(frozen=True)
class Recipe:
    """options: what differs from the preset. source: where the choice comes from, in words. start: folder of a
    pretrained model to go on from; empty where training begins anew."""

    preset: str
    options: Mapping[str, Any]
    source: str
    start: str = ""

    @property
    def config(self) -> TrainConfig:
        """The configuration that it names. Raises UserError for a preset or an option that does not exist."""
        return changed(preset(self.preset), self.options)

    def __str__(self) -> str:
        """For whoever watches the run."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        begins = f", starting from {self.start}" if self.start else ""
        return f"preset {self.preset}{options}{begins} ({self.source})"


def chosen(connection: psycopg.Connection[Any], name: str, options: Mapping[str, Any], start: str = "") -> Recipe:
    """The recipe of a run. name: a preset; empty keeps the live generation's, whose options those given are added to.

    start: folder of a pretrained model; empty keeps the live generation's with its preset.

    A run renews what serves: it does not replace it by another model unless that is asked for. Raises UserError for a
    preset, an option or a name among the options that does not exist, before any work.
    """
    live = None if name else lifecycle.live(connection)
    if live is not None:
        kept, before = live.recipe
        source = f"as generation {live.generation}, which is live"
        found = Recipe(kept, {**before, **options}, source, start or live.config.get("start", ""))
    else:
        found = Recipe(name or DEFAULT, options, "as asked for" if name else "nothing is live yet", start)
    try:
        _check(found)
    except UserError as error:
        if live is None:
            raise
        raise UserError(f"{error}. The recipe is {found}; --preset NAME takes another one") from error
    return found


def _check(recipe: Recipe) -> None:
    from encoders.training.checks import check_names

    check_names(recipe.config)

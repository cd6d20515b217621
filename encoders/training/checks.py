"""What a training refuses before it starts: names of nothing, and data that the towers cannot read."""

from collections.abc import Collection

from encoders.catalogue import Catalogue, Histories
from encoders.config import TrainConfig
from encoders.towers import losses
from encoders.towers.fusion import FUSIONS
from encoders.towers.interests import EXTRACTORS
from polytower.errors import UserError


def check(config: TrainConfig, catalogue: Catalogue, train: Histories) -> None:
    """Raises UserError where towers of this configuration cannot be trained on these data. train: the training part."""
    check_names(config)
    check_attributes(config, train)
    check_content(config, catalogue)
    check_queries(config, train)
    if not len(train) or train.lengths.max() < 2:
        raise UserError("training needs at least one user with two interactions (four, if the last two are held out)")


def check_names(config: TrainConfig) -> None:
    """Raises UserError for a name that is in none of the registries, with the names that are."""
    given: list[tuple[str, str, Collection[str]]] = [
        ("extractor", config.towers.extractor, EXTRACTORS),
        ("fusion", config.towers.fusion, ("none", *FUSIONS)),
        ("objective", config.objective, losses.OBJECTIVES),
        ("repel", config.repel, losses.REPELS),
    ]
    if config.windows and config.objective not in losses.SEVERAL_TARGETS:
        several = " and ".join(losses.SEVERAL_TARGETS)
        raise UserError(
            f"configuration: objective {config.objective!r} takes one target, windows draw several; {several} do"
        )
    for option, name, registry in given:
        if name not in registry:
            raise UserError(f"configuration: no {option} {name!r}; there are {', '.join(registry)}")


def check_attributes(config: TrainConfig, histories: Histories) -> None:
    """Raises UserError where the towers read attributes of another width than the histories bring, or of none."""
    read, found = config.towers.user_attributes, histories.attributes
    if read and (found is None or found.shape[1] != read):
        brought = "none" if found is None else f"{found.shape[1]} numbers"
        raise UserError(f"training: towers.user_attributes={read}, but the users' attributes bring {brought}")


def check_queries(config: TrainConfig, histories: Histories) -> None:
    """Raises UserError where queries are what the towers are made of and no event has any."""
    if config.towers.pair != "none" and (histories.queries is None or not (histories.queries >= 0).any()):
        raise UserError(
            f"training: the preset {config.preset} is built on what users searched for, and no interaction has a query "
            "that is encoded; load interactions with a column query, or take another preset, such as short"
        )


def check_content(config: TrainConfig, catalogue: Catalogue) -> None:
    """Raises UserError where content is what the towers are made of and the catalogue has none."""
    if not catalogue.modalities and (config.towers.content_dim or config.towers.cold == "ridge"):
        raise UserError(
            f"training: the preset {config.preset} is built on the items' content, and no item has any embedded; "
            "encode text, pictures or attributes, or take a preset without content, such as short"
        )

"""What is refused before a training begins: names, options and data that do not go together."""

from collections.abc import Collection

from encoders.catalogue import Catalogue, Histories
from encoders.config import TrainConfig
from encoders.towers import losses
from encoders.towers.families import FAMILIES
from encoders.towers.fusion import FUSIONS
from encoders.towers.interests import EXTRACTORS
from encoders.training.recipes import PRETRAINING
from polytower.errors import UserError


def check(config: TrainConfig, train: Histories, *, starts: bool) -> None:
    """Raises UserError where nothing of this configuration can be trained on these histories.

    train: the training part. starts: whether training goes on from earlier weights.
    """
    check_names(config)
    check_family(config, starts=starts)
    check_attributes(config, train)
    check_queries(config, train)
    if not len(train) or train.lengths.max() < 2:
        raise UserError("training needs at least one user with two interactions (four, if the last two are held out)")


def check_names(config: TrainConfig) -> None:
    """Raises UserError for a name that is in none of the registries, with the names that are."""
    given: list[tuple[str, str, Collection[str]]] = [
        ("family", config.towers.family, FAMILIES),
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


def check_family(config: TrainConfig, *, starts: bool) -> None:
    """Raises UserError for options that the family cannot have, and for no epoch without a start."""
    family = config.towers.family
    if config.pretrain_epochs and family not in PRETRAINING:
        raise UserError(
            f"configuration: pretrain_epochs is for {', '.join(PRETRAINING)}; {family} start from co-occurrence"
        )
    if FAMILIES[family].by_id and config.initial == "identity":
        raise UserError(f"configuration: {family} start from svd or normal ID embeddings, not from identity")
    if not FAMILIES[family].by_id:
        wrong = {
            "towers.interests (1)": config.towers.interests != 1,
            "table_optimiser (dense)": config.table_optimiser != "dense",
            "towers.cold (content)": config.towers.cold != "content",
            "towers.user_attributes (0)": config.towers.user_attributes != 0,
            "towers.pair (none)": config.towers.pair != "none",
            "unit_epochs (0)": config.unit_epochs != 0,
            "windows (none)": bool(config.windows),
            "lora_rank (0)": config.lora_rank != 0,
            "initial (identity, normal)": config.initial == "svd",
        }
        found = [name for name, bad in wrong.items() if bad]
        if found:
            raise UserError(f"configuration: {family} knows no other value of {', '.join(found)}")
    begins = starts or config.pretrain_epochs > 0 or config.initial == "identity"
    if not config.epochs and not begins:
        raise UserError("configuration: epochs=0 serves what training starts from, and it starts from nothing")


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
    towers = config.towers
    if not catalogue.modalities and (towers.content_dim or towers.cold == "ridge" or not FAMILIES[towers.family].by_id):
        raise UserError(
            f"training: the preset {config.preset} is built on the items' content, and no item has any embedded; "
            "encode text, pictures or attributes, or take a preset without content, such as short"
        )

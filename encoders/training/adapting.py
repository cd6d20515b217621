"""Encoders that are trained with the towers: which these are, and what the towers are worth with them."""

from collections.abc import Mapping

from encoders.catalogue import Catalogue
from encoders.config import TrainConfig
from encoders.evaluation.evaluate import TowersScorer, validation_ndcg
from encoders.evaluation.splits import Questions
from encoders.towers.adapted import Live
from encoders.towers.model import Model
from polytower.errors import UserError


def check_live(config: TrainConfig, catalogue: Catalogue, live: Mapping[str, Live]) -> dict[str, Live]:
    """The encoders to train, of the modalities that the catalogue has. Raises UserError where there should be some."""
    if not config.lora_rank:
        return {}
    found = {name: live[name] for name, _ in catalogue.modalities if name in live}
    if not found:
        raise UserError(
            f"training: the preset {config.preset} trains the encoders of the content (lora_rank={config.lora_rank}), "
            "and none was given that can be; give some, or leave them frozen with lora_rank=0"
        )
    return found


def measured_again(towers: Model, validation: Questions, config: TrainConfig) -> dict[str, float]:
    """Validation of towers whose encoders were trained, now that these have encoded the catalogue; else {}.

    While they are trained, other items than the live ones are only near what they will be.
    """
    if not towers.adapters or not len(validation):
        return {}
    scorer = TowersScorer(towers, softness=config.softness)
    ndcg, recall = validation_ndcg(scorer, validation, towers.items)
    return {"ndcg@10": ndcg, "recall@50": recall}

"""Items that nobody has met yet, by closed form: a ridge regression from content to the *trained* IDs, and κ.

Nothing is trained for it, so items that come between two trainings are placed as well as those of the training. κ says
how far a foretold ID is trusted: 1 scores it like a trained one, and cold items then crowd out warm ones; it is the
largest whose cost on warm items stays within what the configuration allows, found on validation with a twentieth of
the warm items made cold.

Legend: V items, C width of the features, I width of the IDs, Q questions.
"""

import numpy as np
import torch
from torch import Tensor

from encoders.catalogue import BoolArray, FloatArray
from encoders.closed_form import ridge
from encoders.config import TrainConfig
from encoders.evaluation import metrics
from encoders.evaluation.evaluate import TowersScorer, ranks_of
from encoders.evaluation.splits import Questions
from encoders.towers.model import Model
from encoders.towers.towers import Towers

KAPPAS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0)
HIDDEN = 0.05  # share of the warm items that are made cold to find κ
QUESTIONS = 2000  # validation questions asked for each κ
DEPTH = 50
UNTUNED = 0.8  # κ where no question is left to tune it on


def settle(towers: Model, validation: Questions, config: TrainConfig) -> dict[str, float]:
    """Fits the ridge and κ of towers that have them, in place; what was found on validation, {} without a ridge.

    kappa; cold_recall@50: of validation items that are cold or were made so; warm_loss: share of Recall@50 of warm
    ones lost to the cold ones in the lists.
    """
    if not isinstance(towers, Towers) or not towers.config.doubt:
        return {}
    tower, content = towers.item_tower, towers.item_tower.content
    assert content is not None
    features_VC = features_of(towers)
    warm = (tower.counts > 0).numpy() & (features_VC != 0).any(axis=1)
    kappa, found = config.kappa, dict[str, float]()
    if kappa is None and not len(validation):
        kappa = UNTUNED
    elif kappa is None:
        found = _tuned(towers, features_VC, warm, validation, config)
        kappa = found["kappa"]
    _fit(towers, features_VC, warm, config.ridge)
    tower.kappa.fill_(kappa)
    if content.linear is not None and not towers.config.content_dim and config.content_weight == 0:
        content.linear.weight.data.copy_(tower.ridge.T)  # nothing else teaches it
    return found | {"kappa": kappa}


def features_of(towers: Towers) -> FloatArray:
    """What the linear maps read of every item of the catalogue, [V, C]; zero rows where there is nothing."""
    content = towers.item_tower.content
    assert content is not None
    with torch.no_grad():
        everything_V = torch.arange(len(towers.item_tower.counts), device=towers.device)
        found: Tensor = content.features(*towers.source.read(everything_V))
    return found.cpu().numpy()


def _fit(towers: Towers, features_VC: FloatArray, warm: BoolArray, strength: float) -> None:
    tower = towers.item_tower
    weights = np.log1p(tower.counts.numpy()) * warm
    with torch.no_grad():
        ids_VI = tower.by_id(torch.arange(len(warm)))[:, : towers.config.id_dim].numpy()
    mean = float(weights[warm].mean()) if warm.any() else 1.0
    tower.ridge.copy_(torch.from_numpy(ridge(features_VC, ids_VI, weights, strength * mean)))


def _tuned(
    towers: Towers, features_VC: FloatArray, warm: BoolArray, validation: Questions, config: TrainConfig
) -> dict[str, float]:
    """κ and what it was chosen by, with some warm items made cold for as long as this looks."""
    rng = np.random.default_rng([config.seed, 2])
    hidden = np.flatnonzero(warm)
    hidden = rng.permutation(hidden)[: max(1, int(HIDDEN * len(hidden)))]
    chosen = np.sort(rng.permutation(len(validation))[:QUESTIONS])
    asked, _ = validation.select(chosen)
    scorer, tower = TowersScorer(towers, softness=config.softness), towers.item_tower
    counts = tower.counts.clone()

    def ranks(kappa: float) -> Tensor:
        tower.kappa.fill_(kappa)
        scorer.candidates_VD = towers.item_embeddings().item
        return ranks_of(scorer, asked, len(counts))

    try:
        tower.counts[torch.from_numpy(hidden)] = 0
        _fit(towers, features_VC, warm & (tower.counts > 0).numpy(), config.ridge)
        cold_V = tower.counts == 0
        scorer.candidates_VD = scorer.items_VD.masked_fill(cold_V[:, None], float("nan"))  # nowhere in the lists
        alone_Q = ranks_of(scorer, asked, len(counts))
        tracks = {kappa: ranks(kappa) for kappa in KAPPAS}
    finally:
        tower.counts.copy_(counts)
    is_cold_Q = cold_V[torch.from_numpy(asked.targets)]
    alone = max(metrics.recall(alone_Q[~is_cold_Q], DEPTH), 1e-9)
    rows = [
        (kappa, metrics.recall(ranks_Q[is_cold_Q], DEPTH), 1 - metrics.recall(ranks_Q[~is_cold_Q], DEPTH) / alone)
        for kappa, ranks_Q in tracks.items()
    ]
    within = [row for row in rows if row[2] <= config.cold_loss] or rows[-1:]
    kappa, recall, loss = max(within, key=lambda row: (row[1], -row[0]))
    return {"kappa": kappa, f"cold_recall@{DEPTH}": recall, "warm_loss": loss}

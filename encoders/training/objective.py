"""What one training step minimises: ranking of the next item, interest weights, repel, content.

Legend: B rows, T tokens, P positions (valid tokens), U distinct items of the step, N negatives, K interests, D width.
"""

import torch
from torch import Tensor

from encoders.config import TrainConfig
from encoders.towers import losses
from encoders.towers.towers import Towers
from encoders.training.packing import Batch

_MANY = 1_000_000  # items beyond which negatives are drawn without a permutation of them all
_CONTENT_SAMPLE = 512  # positions whose next item teaches the content embeddings in a step


def batch_loss(
    towers: Towers, batch: Batch, config: TrainConfig, warm: Tensor, frequency: Tensor
) -> tuple[Tensor, Tensor]:
    """(ranking loss, detached; total loss) of one step. warm: indices of the trained items; frequency: their shares."""
    with towers.source.step(batch.targets):
        ranking, total = _step_loss(towers, batch, config, warm, frequency)
        taught = towers.source.teaching_loss()
    return ranking, total if taught is None else total + taught


def _step_loss(
    towers: Towers, batch: Batch, config: TrainConfig, warm: Tensor, frequency: Tensor
) -> tuple[Tensor, Tensor]:
    drawn, bias = draw_negatives(config, warm, frequency, batch.targets)
    wanted = batch.targets if batch.drawn is None else batch.drawn  # [P], or [P, S]
    parts = [batch.inputs.flatten(), batch.targets, wanted.flatten(), drawn]
    used, place = torch.unique(torch.cat(parts), return_inverse=True)
    item_UD = towers.embed_warm(used)
    inputs, targets, asked_for, others = place.split([len(part) for part in parts])
    history_BTD = item_UD[inputs].view(*batch.inputs.shape, -1).masked_fill(~batch.events[..., None], 0.0)
    found = towers.user_tower(history_BTD, batch.positions, batch.allowed, context=batch.context)
    interests_PKD, weights_PK = found.vectors[batch.valid], found.weights[batch.valid]
    column_U = torch.full((len(used),), -1, device=used.device)
    column_U[others] = torch.arange(len(drawn), device=used.device)
    columns = column_U[asked_for]
    hits = torch.nonzero(columns >= 0).squeeze(1)
    negatives = losses.Negatives(item_UD[others], bias, hits // wanted[0].numel(), columns[hits])
    positives_PD = item_UD[targets]
    ranking = losses.OBJECTIVES[config.objective](
        interests_PKD, weights_PK > 0, item_UD[asked_for].view(*wanted.shape, -1), negatives, config.temperature
    )
    total = ranking
    if config.towers.interests > 1:
        total = total + config.weight_loss * losses.weight_loss(interests_PKD, weights_PK, positives_PD)
        if config.repel_weight > 0:
            total = total + config.repel_weight * losses.REPELS[config.repel](interests_PKD, config.repel_margin)
        if config.routing_weight > 0 and found.attention is not None:
            spread = losses.attention_variance(found.attention[batch.valid], interests_PKD.shape[-1])
            total = total + config.routing_weight * spread
    if towers.item_tower.content is not None and config.content_weight > 0:
        asked = (interests_PKD, weights_PK > 0, batch.targets)
        total = total + config.content_weight * content_loss(towers, config, asked, drawn, item_UD[others])
    if towers.item_tower.contrast is not None and config.contrast_weight > 0:
        total = total + config.contrast_weight * contrast_loss(towers, config, batch.targets)
    return ranking.detach(), total


def draw_negatives(config: TrainConfig, warm: Tensor, frequency: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(distinct items int64 [N], bias float [N]) shared by the step's positions; the whole trained catalogue for 0.

    With logq the bias is −log of how often an item is expected among them, which makes the sampled sum an unbiased
    estimate of the full one (Bengio and Senécal 2008; Yi et al. 2019 for in-batch, Yang et al. 2020 for mixed).
    targets: the step's next items; frequency: the share of each warm item among all.
    """
    if config.negatives == 0 or config.negatives >= len(warm):
        return warm, torch.zeros(len(warm), device=warm.device)
    if config.sampling in ("in_batch", "mixed"):
        return _in_batch(config, warm, frequency, targets)
    if config.sampling == "popularity":
        rows = torch.multinomial(frequency, config.negatives)
        share = frequency[rows]
    else:
        rows = _distinct(len(warm), config.negatives, warm.device)
        share = torch.full_like(frequency[rows], 1 / len(warm))
    bias = -(len(rows) * share).log() if config.logq else torch.zeros_like(share)
    return warm[rows], bias


def _in_batch(config: TrainConfig, warm: Tensor, frequency: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """At most `negatives` of the step's next items; for "mixed" half as many, and uniform ones beside them."""
    uniform = config.negatives // 2 if config.sampling == "mixed" else 0
    found = torch.unique(targets)
    kept = found[torch.randperm(len(found), device=found.device)[: config.negatives - uniform]]
    more = _distinct(len(warm), uniform, warm.device)
    rows = torch.unique(torch.cat([torch.searchsorted(warm, kept), more]))
    if not config.logq:
        return warm[rows], torch.zeros(len(rows), device=warm.device)
    # the chance to be among the step's P next items, and kept; to be drawn uniformly; to be either
    in_batch = -torch.expm1(len(targets) * torch.log1p(-frequency[rows].clamp(max=0.99))) * (len(kept) / len(found))
    either = 1 - (1 - in_batch) * (1 - uniform / len(warm))
    return warm[rows], -either.log()


def _distinct(size: int, count: int, device: torch.device) -> Tensor:
    """`count` distinct numbers below `size`, int64; of millions at a cost that does not grow with them.

    A permutation of ten million takes longer than the rest of a step; an eighth too many draws hardly ever repeat so
    often that a number is missing, and then the step has a few negatives less.
    """
    if size < _MANY or count > size // 100:
        return torch.randperm(size, device=device)[:count]
    drawn = torch.unique(torch.randint(size, (count + count // 8 + 16,), device=device))
    kept: Tensor = drawn[torch.randperm(len(drawn), device=device)[:count]]
    return kept


def content_loss(
    towers: Towers, config: TrainConfig, asked: tuple[Tensor, Tensor, Tensor], drawn: Tensor, negatives_ND: Tensor
) -> Tensor:
    """What teaches the content embeddings, on a sample of the positions: scalar. Only they get a gradient.

    asked: interests [P, K, D], used [P, K], targets [P]; drawn, negatives_ND: the step's negatives and their item
    embeddings. Two parts: the content-ID contrast (`losses.content_contrast`), and the ranking loss over the warm items
    *and* the contents of the sample, in which the next item stands as its content embedding with probability
    `content_share`, else as itself. The first case makes a cold item reachable, the second keeps contents from
    crowding out warm items: with the first alone validation NDCG@10 fell from .10 to .03 (docs/LOG.md).
    """
    interests_PKD, used_PK, targets_P = asked
    chosen = torch.randperm(len(targets_P), device=targets_P.device)[:_CONTENT_SAMPLE]
    items_C, own_S = torch.unique(targets_P[chosen], return_inverse=True)
    found = towers.embed(items_C)
    has_S = found.has_content[own_S]
    chosen, own_S = chosen[has_S], own_S[has_S]
    if not len(chosen):
        return interests_PKD.new_zeros(())
    contrast = losses.content_contrast(
        found.content[found.has_content], found.item[found.has_content], config.content_temperature
    )
    interests_SKD, used_SK = interests_PKD[chosen].detach(), used_PK[chosen]
    as_content_S = torch.rand(len(chosen), device=chosen.device) < config.content_share
    positives_SD = torch.where(as_content_S[:, None], found.content[own_S], found.item[own_S].detach())
    scores_SK = torch.einsum("skd,sd->sk", interests_SKD, positives_SD).masked_fill(~used_SK, -1.0)
    # an item is no negative of itself, neither as its content nor as its embedding
    same = torch.cat([items_C[own_S][:, None] == items_C, items_C[own_S][:, None] == drawn], dim=1)
    rows, columns = torch.nonzero(same | ~torch.cat([found.has_content, torch.ones_like(drawn, dtype=torch.bool)]),
                                  as_tuple=True)  # fmt: skip
    vectors = torch.cat([found.content, negatives_ND.detach()])
    negatives = losses.Negatives(vectors, torch.zeros_like(vectors[:, 0]), rows, columns)
    ranking = losses.max_softmax(interests_SKD, used_SK, scores_SK.amax(dim=1), negatives, config.temperature)
    return contrast + config.content_ranking * ranking


def contrast_loss(towers: Towers, config: TrainConfig, targets_P: Tensor) -> Tensor:
    """EM3's contrast between the contents and the IDs of a sample of the step's next items: scalar."""
    items = torch.unique(targets_P)
    items = items[torch.randperm(len(items), device=items.device)[:_CONTENT_SAMPLE]]
    content, own = towers.item_tower.contrasted(towers.embed(items))
    return losses.content_id_contrast(content, own, config.contrast_temperature)

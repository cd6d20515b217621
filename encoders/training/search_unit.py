"""SEMINAR's Pretraining Search Unit (arXiv 2407.10714): L = L_next + L_align + L_qi, each with a weight, 0 for off.

- L_next: the next (query, item) pair against sampled pairs, binary cross-entropy on the history's state.
- L_align: an item is recognised across its own views (ID, and each modality alone), InfoNCE between every two of them.
- L_qi: a query finds the item that was taken among five others of the same sequence, InfoNCE.

What it leaves behind are the tables: the towers start with its items and its map of queries (`restore`), and with a new
transformer. The released code adds log p of the right item to the loss where −log p is meant; this is −log p.

Deviations: scores are cosines over τ, since items and queries have unit length here; a step's sampled pairs are shared
by its positions; where a sequence has fewer than five other items, the missing negatives come from the step's others.

Legend: B rows, T tokens, P positions (valid tokens), S sampled pairs, N negatives, C items, D width.
"""

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.catalogue import Catalogue
from encoders.config import TrainConfig
from encoders.towers.towers import Towers
from encoders.training.packing import Batch
from encoders.training.start import Start

_SAMPLED_PAIRS = 64  # negatives of L_next in a step
_ALIGNED = 512  # items of a step that L_align looks at: it compares each with all

# What fine-tuning takes over.
_TABLES = ("item_tower.", "user_tower.pairs.")


def unit_loss(
    towers: Towers,
    batch: Batch,
    config: TrainConfig,
    warm: Tensor,  # noqa: ARG001 as `objective.batch_loss` is called
    frequency: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """(total, detached; total) of one step; the arguments are those of `objective.batch_loss`."""
    used, place = torch.unique(torch.cat([batch.inputs.flatten(), batch.targets]), return_inverse=True)
    item_UD = towers.embed_warm(used)
    inputs, targets = place.split([batch.inputs.numel(), len(batch.targets)])
    taken_PD, pairs = item_UD[targets], towers.user_tower.pairs
    total = taken_PD.sum() * 0
    texts_PW = None if batch.context.asked is None else batch.context.asked[batch.valid]
    if config.unit_next > 0:
        history_BTD = item_UD[inputs].view(*batch.inputs.shape, -1).masked_fill(~batch.events[..., None], 0.0)
        context = batch.context._replace(asked=None)
        found = towers.user_tower(history_BTD, batch.positions, batch.allowed, context=context)
        pair_PD = taken_PD if pairs is None or texts_PW is None else pairs(texts_PW, taken_PD)
        loss = next_pair_loss(found.vectors[batch.valid], F.normalize(pair_PD, dim=-1), config.unit_temperature)
        total = total + config.unit_next * loss
    if config.unit_align > 0 and towers.item_tower.content is not None:
        items_C = torch.unique(batch.targets)
        items_C = items_C[torch.randperm(len(items_C), device=items_C.device)[:_ALIGNED]]
        total = total + config.unit_align * alignment_loss(*views(towers, items_C), config.unit_temperature)
    if config.unit_relevance > 0 and pairs is not None and texts_PW is not None:
        asks = (texts_PW != 0).any(dim=-1)
        others_PN = sequence_negatives(batch, config.unit_negatives)
        total = total + config.unit_relevance * relevance_loss(
            pairs.queries(texts_PW)[asks], taken_PD, batch.targets, asks, others_PN[asks], config.unit_temperature
        )
    return total.detach(), total


def next_pair_loss(states_PKD: Tensor, pairs_PD: Tensor, temperature: float) -> Tensor:
    """−log σ(s·p / τ) of each state's next pair, and −log(1 − σ(s·p' / τ)) of sampled ones, means added: scalar.

    states_PKD: unit interests, of which the best counts; pairs_PD: unit pairs. A sampled pair that is the very next
    pair of a position (the same vector) is none of its negatives.
    """
    chosen = torch.randperm(len(pairs_PD), device=pairs_PD.device)[:_SAMPLED_PAIRS]
    own_P = (states_PKD * pairs_PD[:, None]).sum(dim=-1).amax(dim=1) / temperature
    others_PS = torch.einsum("pkd,sd->pks", states_PKD, pairs_PD[chosen]).amax(dim=1) / temperature
    # equal but for rounding: one query and one item give one vector
    other = (pairs_PD.detach() @ pairs_PD[chosen].detach().T) < 1 - 1e-6
    refused = (F.softplus(others_PS) * other).sum() / other.sum().clamp(min=1)
    return F.softplus(-own_P).mean() + refused


def views(towers: Towers, items_C: Tensor) -> tuple[Tensor, Tensor]:
    """Each item by its ID alone, and by each modality alone: unit vectors [1 + M, C, D], and which are present."""
    tower, names = towers.item_tower, [name for name, _ in towers.config.modalities]
    assert tower.content is not None
    content, present = towers.content_of(items_C)
    nothing = torch.zeros_like(present[names[0]])
    alone = [tower.content(content, {other: present[name] if other == name else nothing for other in names})
             for name in names]  # fmt: skip
    return torch.stack([tower.by_id(items_C), *alone]), torch.stack([~nothing, *(present[name] for name in names)])


def alignment_loss(views_VCD: Tensor, present_VC: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE between every two views of C items, mean over the pairs of views: scalar.

    An item's other view is to be found among the same view of the other items. Only items that have both views count.
    """
    losses = []
    for one, other in combinations(range(len(views_VCD)), 2):
        both = present_VC[one] & present_VC[other]
        scores_CC = views_VCD[one][both] @ views_VCD[other][both].T / temperature
        if len(scores_CC) > 1:
            own = torch.arange(len(scores_CC), device=scores_CC.device)
            losses.append((F.cross_entropy(scores_CC, own) + F.cross_entropy(scores_CC.T, own)) / 2)
    return torch.stack(losses).mean() if losses else views_VCD.sum() * 0


def relevance_loss(
    queries_QD: Tensor, taken_PD: Tensor, items_P: Tensor, asks_P: Tensor, others_QN: Tensor, temperature: float
) -> Tensor:
    """−log of the share that the taken item has among itself and N others, by cosine with its query / τ: scalar.

    queries_QD: of the positions where asks_P (bool) holds; taken_PD, items_P: what was taken at every position, as
    vectors and numbers; others_QN: int64, positions of the negatives. One that took the same item does not count.
    """
    if not len(queries_QD):
        return taken_PD.sum() * 0
    own_Q = (queries_QD * taken_PD[asks_P]).sum(dim=-1)
    others = torch.einsum("qd,qnd->qn", queries_QD, taken_PD[others_QN])
    others = others.masked_fill(items_P[others_QN] == items_P[asks_P][:, None], float("-inf"))
    scores = torch.cat([own_Q[:, None], others], dim=1) / temperature
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64, device=scores.device))


def sequence_negatives(batch: Batch, count: int) -> Tensor:
    """Positions int64 [P, N] to compare each position with: of its own sequence, another item, drawn evenly.

    Where these are fewer than `count`, any positions of the step fill up.
    """
    device, size = batch.targets.device, len(batch.targets)
    position_BT = torch.full(batch.valid.shape, -1, dtype=torch.int64, device=device)
    position_BT[batch.valid] = torch.arange(size, device=device)
    rows_PT = position_BT[:, None].expand(-1, position_BT.shape[1], -1)[batch.valid]
    same_PT = (batch.allowed | batch.allowed.transpose(1, 2))[batch.valid] & (rows_PT >= 0)
    same_PT &= batch.targets[rows_PT.clamp(min=0)] != batch.targets[:, None]
    drawn = torch.rand(same_PT.shape, device=device).masked_fill(~same_PT, -1.0)
    best, where = drawn.topk(min(count, drawn.shape[1]), dim=1)
    best, where = (F.pad(part, (0, count - part.shape[1]), value=-1) for part in (best, where))
    own = rows_PT.gather(1, where.clamp(min=0))
    return torch.where(best >= 0, own, torch.randint(size, own.shape, device=device))


def restore(towers: Towers, start: Start, catalogue: Catalogue) -> None:  # noqa: ARG001 (as `start.go_on_from`)
    """The towers start from the pretrained tables, in place; everything else stays as it is."""
    pretrained, _ = start
    tables = {name: value for name, value in pretrained.state_dict().items() if name.startswith(_TABLES)}
    towers.load_state_dict(tables, strict=False)

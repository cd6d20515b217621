"""Item tower and user tower, exportable apart; what is indexed is what the user tower reads.

- item tower: content embeddings of several modalities, some missing -> fused -> **content embedding**; a table row ->
  **ID embedding**; both -> **item embedding**. All three have unit length and one width D, so that one index serves.
- a cold item (no training event) has the content embedding as its item embedding.
- user tower: the history's *item embeddings* -> causal transformer -> K interests and their weights. It needs no item
  table: at serving time the vectors come from the database.

Legend: V items, N chosen items, M modalities, B users, T history, D width, K interests, H content width.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig
from encoders.towers.backbone import Backbone, Backbones, rows_at
from encoders.towers.content_tower import Content
from encoders.towers.interests import EXTRACTORS, READ_QUERY_ONLY, Attentive
from encoders.towers.model import ITEMS_ALONE, NO_CONTENT, Context, Interests, ItemEmbeddings, Model, newest
from encoders.towers.pairs import Pairs


class ItemTower(nn.Module):
    """ID and content, in one space or in two blocks of it (`content_dim`).

    One space: item = normalise(ID + s·content). Blocks: item = [√a·ID ; √(1−a)·content], both unit, so that a score is
    a sum of what behaviour and what content say. s and a follow from the item's training events (`share`,
    `id_share`): one with few leans on what it is. With no event an item has content alone; or, where a ridge from
    content to the trained IDs was fitted (`cold.py`), the ID that it foretells, at κ of its length. The rest of the
    length is *doubt*: the last coordinate, zero in interests and in items that were trained on, so that the vector
    stays a unit one and its score by ID is κ times what it would be.

    With `tail_buckets` the ID of a rare item is the sum of two rows that it shares with others (`hashing.py`), and
    `places` says which. sparse: the table's gradient holds only the rows that were looked up.
    """

    counts: Tensor
    places: Tensor
    ridge: Tensor
    kappa: Tensor

    def __init__(self, config: TowersConfig, items: int) -> None:
        super().__init__()
        self.config, self.sparse = config, False
        rows = config.own_rows + config.tail_buckets if config.tail_buckets else items
        self.table = nn.Parameter(torch.randn(rows, config.id_dim).mul_(0.02))
        self.register_buffer("counts", torch.ones(items))
        if config.tail_buckets:
            self.register_buffer("places", torch.zeros(items, 2, dtype=torch.int32))
        self.content = Content(config) if config.modalities else None
        shrinks = self.content is not None and config.shrinkage > 0
        self.log_shrinkage = nn.Parameter(torch.tensor(config.shrinkage).log()) if shrinks else None
        learns = self.content is not None and config.content_dim > 0 and config.learn_id_share
        self.id_logit = nn.Parameter(torch.tensor(config.id_share).logit()) if learns else None
        if self.content is not None and config.doubt:
            self.register_buffer("ridge", torch.zeros(sum(size for _, size in config.features), config.id_dim))
            self.register_buffer("kappa", torch.zeros(()))
        self.contrast = None
        if self.content is not None and config.contrast_dim:
            maps = {side: nn.Linear(config.dim, config.contrast_dim, bias=False) for side in ("content", "id")}
            self.contrast = nn.ModuleDict(maps)

    def forward(self, items_N: Tensor, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> ItemEmbeddings:
        """items_N: int64 catalogue indices; content[m] [N, dim_m] and present[m] bool [N] are theirs."""
        has_id = self.counts[items_N] > 0
        id_ND = self.by_id(items_N) * has_id[:, None]
        if self.content is None:
            return ItemEmbeddings(torch.zeros_like(id_ND), id_ND, id_ND, torch.zeros_like(has_id), has_id)
        content_ND = self.content(content, present)
        has_content = torch.stack([present[name] for name, _ in self.config.modalities]).any(dim=0)
        has_content = has_content & (content_ND != 0).any(dim=1)
        content_ND = content_ND * has_content[:, None]
        told_ND, told = id_ND, has_id
        if self.training and self.config.id_dropout > 0:  # as if nobody had met the item yet
            told = has_id & (torch.rand(len(items_N), device=has_id.device) >= self.config.id_dropout)
        elif self.config.doubt and not self.training:
            told_ND = torch.where(has_id[:, None], id_ND, self.foretold(content, present))
            told = has_id | has_content
        id_weight_N, content_weight_N = self.weights(items_N, told)
        item_ND = F.normalize(id_weight_N[:, None] * told_ND + content_weight_N[:, None] * content_ND, dim=-1)
        return ItemEmbeddings(content_ND, id_ND, item_ND, has_content, has_id)

    def foretold(self, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """What the IDs of items with this content would be, as far as content tells; [N, D], unit rows by doubt."""
        assert self.content is not None
        id_NI = F.normalize(self.content.features(content, present) @ self.ridge, dim=-1)
        doubt_N1 = (1 - self.kappa.square()).sqrt().expand(len(id_NI), 1)
        return torch.cat([self._padded(self.kappa * id_NI)[:, :-1], doubt_N1], dim=1)

    def weights(self, items_N: Tensor, told_N: Tensor) -> tuple[Tensor, Tensor]:
        """([N], [N]): how much of the ID and of the content is in an item; told_N: whether an ID is there."""
        warm_N = self.counts[items_N] > 0
        share_N = self.share(items_N) * warm_N  # a foretold ID stands for one of many events
        if not self.config.content_dim:
            return told_N.float(), torch.where(told_N, share_N, 1.0)
        most = self.config.id_share if self.id_logit is None else self.id_logit.sigmoid()
        id_N = most * (1 - share_N)
        # the root has no slope at zero: it is taken before the mask
        return id_N.clamp(min=1e-9).sqrt() * told_N, torch.where(told_N, 1 - id_N, 1.0).clamp(min=1e-9).sqrt()

    def contrasted(self, found: ItemEmbeddings) -> tuple[Tensor, Tensor]:
        """c' = normalise(W_c·content) and i' = normalise(W_i·ID) of the items that have both: [N', contrast_dim]."""
        assert self.contrast is not None
        both = found.has_content & found.has_id
        content, own = self.contrast["content"](found.content[both]), self.contrast["id"](found.id[both])
        return F.normalize(content, dim=-1), F.normalize(own, dim=-1)

    @property
    def mixes(self) -> bool:
        """Whether content is part of items that were trained on."""
        reads = self.config.content_dim > 0 or self.config.id_dropout > 0 or self.log_shrinkage is not None
        return self.content is not None and reads

    def by_id(self, items_N: Tensor) -> Tensor:
        """ID embeddings [N, D] of items that were trained on."""
        return self._padded(F.normalize(self.rows(items_N), dim=-1))

    def _padded(self, id_NI: Tensor) -> Tensor:
        return F.pad(id_NI, (0, self.config.dim - self.config.id_dim))

    def rows(self, items_N: Tensor) -> Tensor:
        """The items' rows of the table, [N, D], not normalised; of rare items the sum of the two that they share."""
        if not self.config.tail_buckets:
            return F.embedding(items_N, self.table, sparse=True) if self.sparse else self.table[items_N]
        places_N2 = self.places[items_N].long()
        both_N2D = F.embedding(places_N2, self.table, sparse=self.sparse)
        # an item with a row of its own has it twice in `places`
        scale_N1 = torch.where(places_N2[:, :1] == places_N2[:, 1:], 0.5, 1.0)
        summed: Tensor = both_N2D.sum(dim=1) * scale_N1
        return summed

    def share(self, items_N: Tensor) -> Tensor:
        """Weight of the content beside the ID by the item's events, in [0, 1]; 1 where there is none."""
        counts = self.counts[items_N]
        if self.log_shrinkage is None:
            return (counts == 0).to(counts.dtype)
        start = self.log_shrinkage.exp()
        return start / (counts + start)


class UserTower(nn.Module):
    """Item embeddings of a history -> K interests with weights (`model.Reader`). Knows no item ids.

    What is known of the user (`user_attributes`) is a linear map of the hashed attributes, added to each state. What
    was searched for (`pair`) joins each event's item, and what is searched for now joins the state (`pairs.Pairs`).
    """

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.config = config
        self.reads, self.width = NO_CONTENT, config.dim
        self.backbone = Backbones(config) if config.extractor == "towers" else Backbone(config)
        self.extractor = EXTRACTORS[config.extractor](config)
        self.weigh = nn.Linear(self.backbone.width, config.interests)
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)
        width = self.backbone.width
        self.attributes = nn.Linear(config.user_attributes, width, bias=False) if config.user_attributes else None
        if self.attributes is not None:
            nn.init.zeros_(self.attributes.weight)
        self.pairs = Pairs(config) if config.pair != "none" and config.query_dim else None

    def forward(
        self,
        items_BTD: Tensor,
        positions_BT: Tensor,
        allowed_BTT: Tensor,
        queries: Tensor | None = None,
        context: Context = ITEMS_ALONE,
    ) -> Interests:
        """Interests at the query positions [B, Q, K, D] and weights [B, Q, K]; queries int64 [B, Q], default all T."""
        if self.config.doubt:
            items_BTD = F.pad(items_BTD[..., :-1], (0, 1))
        items_BTD = self._paired(items_BTD, context)
        at_queries = queries if self.config.extractor in READ_QUERY_ONLY else None
        states_BTD = self.backbone(items_BTD, positions_BT, allowed_BTT, at_queries, context.times)
        if self.attributes is not None and context.attributes is not None:
            known = context.attributes
            if at_queries is not None and known.shape[1] > 1:
                known = rows_at(known, at_queries)
            states_BTD = states_BTD + self.attributes(known)
        query_BQD, allowed_BQT = states_BTD, allowed_BTT
        if queries is not None:
            query_BQD = states_BTD if at_queries is not None else rows_at(states_BTD, queries)
            allowed_BQT = rows_at(allowed_BTT, queries)
        query_BQD = self._asking(query_BQD, queries, context)
        attention_BQKT = None
        if isinstance(self.extractor, Attentive):
            attention_BQKT = self.extractor.attention(query_BQD, states_BTD, allowed_BQT)
            drawn_BQKD = self.extractor.read(attention_BQKT, query_BQD, states_BTD)
        else:
            drawn_BQKD = self.extractor(query_BQD, states_BTD, allowed_BQT)
        if self.config.doubt:  # the last coordinate is no taste
            drawn_BQKD = F.pad(drawn_BQKD[..., :-1], (0, 1))
        vectors = F.normalize(drawn_BQKD, dim=-1)
        # detached: the weights are a calibrated report on the interests, not a force on them
        logits = self.weigh(query_BQD.detach())
        if self.config.adaptive:
            logits = logits.masked_fill(~_in_use(allowed_BQT.sum(dim=-1), self.config.interests), float("-inf"))
        return Interests(vectors, logits.softmax(dim=-1), attention_BQKT)

    def _paired(self, items_BTD: Tensor, context: Context) -> Tensor:
        """Items with what was searched for when they were taken."""
        if self.pairs is None or context.queries is None:
            return items_BTD
        pairs_BTD: Tensor = self.pairs(context.queries, items_BTD)
        return pairs_BTD

    def _asking(self, query_BQD: Tensor, queries: Tensor | None, context: Context) -> Tensor:
        """States at the query positions with what is searched for there."""
        if self.pairs is None or context.asked is None:
            return query_BQD
        apart = queries is not None and context.asked.shape[1] > 1
        asked: Tensor = rows_at(context.asked, queries) if queries is not None and apart else context.asked
        joined: Tensor = self.pairs.ask(asked, query_BQD)
        return joined

    def interests(self, items_BTD: Tensor, mask_BT: Tensor, context: Context = ITEMS_ALONE) -> Interests:
        """The interests of users. items_BTD: item embeddings, oldest first; mask_BT bool: True on real events.

        Padding may stand anywhere and changes nothing; of more than `config.history` events the newest count. A row
        without any event gets what the tower learned of first events, if it reads attributes; else finite interests
        that say nothing, and callers fall back on popularity. A tower does without a part of the context, less well.
        """
        items_BTD, mask_BT, context = newest(items_BTD, mask_BT, context, self.config.history)
        items_BTD = items_BTD.masked_fill(~mask_BT[..., None], 0.0)  # no events: the one place holds no item
        steps = items_BTD.shape[1]
        causal = torch.ones(steps, steps, dtype=torch.bool, device=mask_BT.device).tril()
        own = torch.eye(steps, dtype=torch.bool, device=mask_BT.device)
        allowed_BTT = (causal & mask_BT[:, None, :]) | own
        last_B = (mask_BT.sum(dim=1) - 1).clamp(min=0)
        positions_BT = torch.arange(steps, device=mask_BT.device).expand(len(items_BTD), -1)
        found = self(items_BTD, positions_BT, allowed_BTT, last_B[:, None], context)
        attention_BKT = None if found.attention is None else found.attention[:, 0]
        return Interests(found.vectors[:, 0], found.weights[:, 0], attention_BKT)


class Towers(Model):
    """Both towers over a catalogue."""

    user_tower: UserTower

    def __init__(self, config: TowersConfig, catalogue: Catalogue) -> None:
        super().__init__(config, catalogue)
        self.item_tower = ItemTower(config, len(catalogue))
        self.user_tower = UserTower(config)

    @property
    def content_tower(self) -> Content | None:
        return self.item_tower.content

    def embed(self, items_N: Tensor) -> ItemEmbeddings:
        found: ItemEmbeddings = self.item_tower(items_N, *self.content_of(items_N))
        return found

    def embed_warm(self, items_N: Tensor) -> Tensor:
        """Item embeddings alone [N, D] of items that were trained on: content is only computed where it is mixed in."""
        if not self.item_tower.mixes:
            return self.item_tower.by_id(items_N)
        return self.embed(items_N).item

    def events(self, rows_BT: Tensor, items_VD: Tensor) -> Tensor:
        """The items' embeddings."""
        return F.embedding(rows_BT, items_VD)  # three times as fast as indexing

    def over(self, item_ids: Sequence[str], catalogue: Catalogue) -> Self:
        """Items of item_ids keep their ID row, others are cold."""
        moved = type(self)(self.config, catalogue)
        row_of = {item_id: row for row, item_id in enumerate(item_ids)}
        known = [(new, row_of[item_id]) for new, item_id in enumerate(catalogue.item_ids) if item_id in row_of]
        new, old = torch.tensor(known, dtype=torch.int64).view(-1, 2).unbind(dim=1)
        state = {name: value.cpu() for name, value in self.state_dict().items()}
        shared = self.config.tail_buckets > 0  # the table then belongs to no item, and an item's places in it move
        for name in ("item_tower.places" if shared else "item_tower.table", "item_tower.counts"):
            rows = torch.zeros(len(catalogue), *state[name].shape[1:], dtype=state[name].dtype)
            rows[new] = state[name][old]
            state[name] = rows
        moved.load_state_dict(state)
        moved.adapters = self.adapters
        return moved.eval()


def _in_use(lengths: Tensor, interests: int) -> Tensor:
    """K_u = clip(floor(log2 n), 1, K) as a mask [..., K]."""
    used = lengths.clamp(min=2).float().log2().floor()
    return torch.arange(interests, device=lengths.device) < used[..., None]

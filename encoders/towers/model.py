"""What a family of models is to the rest of the house: evaluation, builds and the server know no more than this.

Legend: V items, N chosen items, M modalities, B users, T history, D width, K interests, X width of an event.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig
from encoders.towers.backbone import rows_at
from encoders.towers.content_source import ContentSource, Frozen, Modalities

_CHUNK = 8192  # items or users embedded at once outside training


class ItemEmbeddings(NamedTuple):
    """content, id, item: [N, D], unit rows, or zero rows where the mask beside says that there is nothing.

    has_content, has_id: bool [N]. An item that has neither has a zero item embedding and is never recommended.
    """

    content: Tensor
    id: Tensor
    item: Tensor
    has_content: Tensor
    has_id: Tensor


class Interests(NamedTuple):
    """vectors [B, K, D], unit length; weights [B, K], non-negative, sum 1. Weight 0 marks an interest not in use.

    attention: [B, K, T], of extractors that have one.
    """

    vectors: Tensor
    weights: Tensor
    attention: Tensor | None = None


class Context(NamedTuple):
    """What the user tower may read beside the items; what is None, or unread (`TowersConfig.reads`), is left out.

    times: int64 [B, T], when the events happened, microseconds. attributes: float32 [B, 1, A], what is known of the
    users (`encoders.content.attributes.user_vectors`), or [B, T, A] in packed rows; zeros for a user of whom nothing is
    known. queries: float32 [B, T, W], text embeddings of what was searched for when the events happened; asked:
    [B, 1, W], of what is searched for now, or [B, T, W] in packed rows; zeros for nothing.
    """

    times: Tensor | None = None
    attributes: Tensor | None = None
    queries: Tensor | None = None
    asked: Tensor | None = None

    def to(self, device: torch.device) -> "Context":
        """The same on another device."""
        return Context(*(None if value is None else value.to(device) for value in self))


ITEMS_ALONE = Context()
NO_CONTENT: tuple[tuple[str, int], ...] = ()


class Reader(Protocol):
    """The user's side of a model, as it travels to the server: it holds no item.

    reads: the modalities (name, width) of which an event's row is made, side by side, zeros for one that the item
    lacks; empty where the row is the item's embedding. width: of such a row.
    """

    config: TowersConfig
    reads: tuple[tuple[str, int], ...]
    width: int

    def interests(self, events_BTX: Tensor, mask_BT: Tensor, context: Context = ITEMS_ALONE) -> Interests:
        """The interests of users; events oldest first, mask_BT (bool): True on real events."""


class Asked(Protocol):
    """The item's side without an ID: content -> a content embedding, for questions by text or picture.

    widths: by modality, of what it is given.
    """

    widths: dict[str, int]

    def __call__(self, content: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """content[m]: [N, dim_m]; present[m]: bool [N]. [N, D], unit rows where anything is present."""


class Model(nn.Module, ABC):
    """A model over a catalogue, and the source that it reads the content from; the embeddings are never saved.

    adapters: by modality, of the encoders whose embeddings the model was trained to read; none for frozen ones.
    """

    user_tower: Reader
    source: ContentSource

    def __init__(self, config: TowersConfig, catalogue: Catalogue) -> None:
        super().__init__()
        if config.modalities != catalogue.modalities:
            raise ValueError(f"towers for {config.modalities} cannot read a catalogue of {catalogue.modalities}")
        self.config, self.items = config, len(catalogue)
        self.source = Frozen(catalogue)
        self.adapters: Mapping[str, bytes] = {}

    @property
    @abstractmethod
    def content_tower(self) -> nn.Module | None:
        """An `Asked`, or None for a model without content."""

    @abstractmethod
    def embed(self, items_N: Tensor) -> ItemEmbeddings:
        """The three embeddings of these items (int64 catalogue indices), with gradients."""

    @abstractmethod
    def events(self, rows_BT: Tensor, items_VD: Tensor) -> Tensor:
        """What the user tower reads of these items (int64 catalogue indices), [B, T, X]. items_VD: all embeddings."""

    @abstractmethod
    def over(self, item_ids: Sequence[str], catalogue: Catalogue) -> Self:
        """The same model over another catalogue, in evaluation mode, on the CPU. item_ids: those trained on, in order.

        The catalogue must have the modalities that the model was trained with.
        """

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def content_of(self, items_N: Tensor) -> tuple[Modalities, Modalities]:
        """({modality: [N, dim_m]}, {modality: bool [N]}) of these items: rows, and which of them are there."""
        return self.source.read(items_N)

    def item_embeddings(self) -> ItemEmbeddings:
        """The three embeddings of the whole catalogue, without gradients, in evaluation mode: [V, D] each."""
        with torch.no_grad(), evaluating(self):
            chunks = [self.embed(rows) for rows in torch.split(torch.arange(self.items, device=self.device), _CHUNK)]
        return ItemEmbeddings(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))

    def user_interests(self, events_BTX: Tensor, mask_BT: Tensor, context: Context = ITEMS_ALONE) -> Interests:
        """`Reader.interests` without gradients, in evaluation mode."""
        with torch.no_grad(), evaluating(self):
            return self.user_tower.interests(events_BTX, mask_BT, context)


class evaluating:  # noqa: N801 (reads as a statement: `with evaluating(towers):`)
    """Context: the module is in evaluation mode inside, and as it was before outside."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, module.training

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.before)


def newest(items_BTD: Tensor, mask_BT: Tensor, context: Context, history: int) -> tuple[Tensor, Tensor, Context]:
    """Packs real events to the left, in order, and keeps the newest `history` of each row."""
    lengths_B = mask_BT.sum(dim=1)
    width = int(min(history, max(1, int(lengths_B.max()) if len(lengths_B) else 1)))
    in_place = torch.arange(width, device=mask_BT.device) < lengths_B[:, None]
    if width == mask_BT.shape[1] and torch.equal(mask_BT, in_place):
        return items_BTD, mask_BT, context
    # a stable sort brings the padding to the front: what is wanted is at the end of the row
    order_BT = mask_BT.to(torch.int8).argsort(dim=1, stable=True)[:, -width:]
    kept = mask_BT.gather(1, order_BT)
    left_BT = kept.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    order_BT, kept = order_BT.gather(1, left_BT), kept.gather(1, left_BT)
    times_BT = None if context.times is None else context.times.gather(1, order_BT)
    queries_BTW = None if context.queries is None else rows_at(context.queries, order_BT)
    return rows_at(items_BTD, order_BT), kept, context._replace(times=times_BT, queries=queries_BTW)

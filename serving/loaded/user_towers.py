"""Interests computed now, from the newest events: the user tower inside the server.

torch is imported in the background from the first such request on: a server without them stays small.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from encoders.content.attributes import user_vectors
from serving.errors import PROBLEMS, Problem
from serving.loaded.batching import Batcher
from serving.loaded.loader import Loader
from serving.metrics import ServerMetrics

if TYPE_CHECKING:
    from torch import Tensor

    from encoders.towers.model import Reader

# The live generation and the one before it: requests that started before a promotion still finish.
KEPT = 2
WINDOW = 0.002  # seconds in which concurrent requests become one forward pass
BATCH = 64  # histories of one pass


@dataclass(frozen=True)
class OnlineInterests:
    """vectors: float32 [K, D], unit rows; weights: [K], sum 1. Interests of weight zero are left out."""

    vectors: NDArray[np.float32]
    weights: list[float]


@dataclass(frozen=True, eq=False)
class History:
    """What a user tower may read of one user; of all but the items it reads what it was trained with.

    items: what the tower reads of T items [X], oldest first; times: when they happened, T microseconds since 1970, or
    None; attributes: what is known of the user. queries: embeddings [W] of what was searched for at each event, None
    for nothing; asked: [W], of what is searched for now.
    """

    generation: int
    items: Sequence[NDArray[Any]]
    times: Sequence[int] | None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    queries: Sequence[NDArray[Any] | None] | None = None
    asked: NDArray[np.float32] | None = None

    @property
    def kind(self) -> tuple[int, bool]:
        """Histories of one kind go through the tower together."""
        return self.generation, self.times is None


class UserTowers:
    """The user towers of the newest generations, and the one thread that runs them, batch by batch."""

    def __init__(self, metrics: ServerMetrics, loader: Loader, *, window: float = WINDOW) -> None:
        self._loader = loader
        self._towers: OrderedDict[int, Reader] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="user-tower")
        self._batches: Batcher[History, OnlineInterests | None] = Batcher(
            self._run, self._thread, window=window, size=BATCH, observe=lambda size: metrics.batch("tower", size)
        )

    def __contains__(self, generation: int) -> bool:
        return generation in self._towers

    def reads(self, generation: int) -> tuple[tuple[str, int], ...]:
        """`Reader.reads` of a tower that is kept: the modalities that an event's row is made of, or none."""
        tower = self._towers.get(generation)
        return () if tower is None else tower.reads

    async def load(self, generation: int, weights: bytes, config: Mapping[str, Any]) -> None:
        """Keeps a generation's tower. Raises UserError when weights and config do not fit, and Problem (loading)."""
        await self._loader.torch()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load, generation, weights, config)

    async def interests(self, history: History) -> OnlineInterests:
        """Interests of one user. Raises Problem."""
        found = await self._batches.ask(history)
        if found is None:
            raise Problem(
                PROBLEMS["PT013"], f"generation {history.generation} was replaced while it was read; try again"
            )
        return found

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        self._thread.shutdown(cancel_futures=True)

    def _load(self, generation: int, weights: bytes, config: Mapping[str, Any]) -> None:
        if generation in self._towers:  # another request came first
            return
        import torch

        from encoders.training.checkpoint import load_user_tower

        torch.set_num_threads(1)  # a few histories are too little to share: threads would only spin
        self._towers[generation] = load_user_tower(weights, config)
        while len(self._towers) > KEPT:
            self._towers.popitem(last=False)

    def _run(self, histories: Sequence[History]) -> list[OnlineInterests | None]:
        """One forward pass per generation (nearly always one), histories without times apart; None where the
        generation is no longer kept."""
        found: list[OnlineInterests | None] = [None] * len(histories)
        for kind in {history.kind for history in histories if history.generation in self._towers}:
            places = [place for place, history in enumerate(histories) if history.kind == kind]
            for place, interests in zip(
                places, self._forward(kind[0], [histories[place] for place in places]), strict=True
            ):
                found[place] = interests
        return found

    def _forward(self, generation: int, histories: Sequence[History]) -> list[OnlineInterests]:
        import torch

        from encoders.towers.model import Context

        tower = self._towers[generation]
        self._towers.move_to_end(generation)
        longest = max(1, *(len(history.items) for history in histories))
        items_BTD = np.zeros((len(histories), longest, tower.width), np.float32)
        mask_BT, times_BT = np.zeros(items_BTD.shape[:2], bool), np.zeros(items_BTD.shape[:2], np.int64)
        for place, history in enumerate(histories):
            size = len(history.items)
            if size:
                items_BTD[place, :size] = np.stack(history.items)
            mask_BT[place, :size], times_BT[place, :size] = True, 0 if history.times is None else history.times
        times = None if histories[0].times is None else torch.from_numpy(times_BT)
        attributes = None
        if width := tower.config.user_attributes:
            attributes = torch.from_numpy(user_vectors([history.attributes for history in histories], width))[:, None]
        with torch.inference_mode():
            context = Context(times, attributes, *_queries(histories, tower.config.query_dim, longest))
            found = tower.interests(torch.from_numpy(items_BTD), torch.from_numpy(mask_BT), context)
        vectors_BKD, weights_BK = found.vectors.numpy(), found.weights.numpy()
        return [
            OnlineInterests(vectors[weights > 0], weights[weights > 0].tolist())
            for vectors, weights in zip(vectors_BKD, weights_BK, strict=True)
        ]


def _queries(histories: Sequence[History], width: int, longest: int) -> "tuple[Tensor, Tensor] | tuple[None, None]":
    """What was searched for at the events [B, T, W], and what is now [B, 1, W]; zeros for nothing."""
    import torch

    if not width:
        return None, None
    queries_BTW = np.zeros((len(histories), longest, width), np.float32)
    asked_B1W = np.zeros((len(histories), 1, width), np.float32)
    for place, history in enumerate(histories):
        for step, query in enumerate(history.queries or ()):
            if query is not None:
                queries_BTW[place, step] = query
        if history.asked is not None:
            asked_B1W[place, 0] = history.asked
    return torch.from_numpy(queries_BTW), torch.from_numpy(asked_B1W)

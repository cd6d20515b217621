"""Interests computed now, from the newest events: the user tower inside the server.

torch is imported when the first such request comes, in the tower's own thread: a server without them stays small.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from serving.batching import Batcher
from serving.errors import PROBLEMS, Problem
from serving.metrics import Metrics

if TYPE_CHECKING:
    from encoders.towers import UserTower

# The live generation and the one before it: requests that started before a promotion still finish.
KEPT = 2
WINDOW = 0.002  # seconds in which concurrent requests become one forward pass
BATCH = 64  # histories of one pass


@dataclass(frozen=True)
class OnlineInterests:
    """vectors: float32 [K, D], unit rows; weights: [K], sum 1. Interests of weight zero are left out."""

    vectors: NDArray[np.float32]
    weights: list[float]


History = tuple[int, NDArray[np.float32]]


class UserTowers:
    """The user towers of the newest generations, and the one thread that runs them, batch by batch."""

    def __init__(self, metrics: Metrics, *, window: float = WINDOW, batch: int = BATCH) -> None:
        self._towers: OrderedDict[int, UserTower] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="user-tower")
        self._batches: Batcher[History, OnlineInterests | None] = Batcher(
            self._run, self._thread, window=window, size=batch, observe=lambda size: metrics.batch("tower", size)
        )

    def __contains__(self, generation: int) -> bool:
        return generation in self._towers

    async def load(self, generation: int, weights: bytes, config: Mapping[str, Any]) -> None:
        """Keeps a generation's tower. Raises UserError when weights and config do not fit."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load, generation, weights, config)

    async def interests(self, generation: int, history: Sequence[NDArray[Any]]) -> OnlineInterests:
        """Interests of one user. history: item embeddings [D], oldest first, at least one. Raises Problem."""
        found = await self._batches.ask((generation, np.stack(history).astype(np.float32)))
        if found is None:
            raise Problem(PROBLEMS["PT013"], f"generation {generation} was replaced while it was read; try again")
        return found

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        self._thread.shutdown(cancel_futures=True)

    def _load(self, generation: int, weights: bytes, config: Mapping[str, Any]) -> None:
        if generation in self._towers:  # another request came first
            return
        import torch

        from encoders.checkpoint import load_user_tower

        torch.set_num_threads(1)  # a few histories are too little to share: threads would only spin
        self._towers[generation] = load_user_tower(weights, config)
        while len(self._towers) > KEPT:
            self._towers.popitem(last=False)

    def _run(self, histories: Sequence[History]) -> list[OnlineInterests | None]:
        """One forward pass per generation (nearly always one); None where the generation is no longer kept."""
        found: list[OnlineInterests | None] = [None] * len(histories)
        for generation in {generation for generation, _ in histories} & self._towers.keys():
            places = [place for place, (each, _) in enumerate(histories) if each == generation]
            for place, interests in zip(
                places, self._forward(generation, [histories[place][1] for place in places]), strict=True
            ):
                found[place] = interests
        return found

    def _forward(self, generation: int, rows: Sequence[NDArray[np.float32]]) -> list[OnlineInterests]:
        import torch

        tower = self._towers[generation]
        self._towers.move_to_end(generation)
        items_BTD = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), np.float32)
        mask_BT = np.zeros(items_BTD.shape[:2], bool)
        for place, row in enumerate(rows):
            items_BTD[place, : len(row)], mask_BT[place, : len(row)] = row, True
        with torch.inference_mode():
            found = tower.interests(torch.from_numpy(items_BTD), torch.from_numpy(mask_BT))
        vectors_BKD, weights_BK = found.vectors.numpy(), found.weights.numpy()
        return [
            OnlineInterests(vectors[weights > 0], weights[weights > 0].tolist())
            for vectors, weights in zip(vectors_BKD, weights_BK, strict=True)
        ]

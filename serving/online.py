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

if TYPE_CHECKING:
    from encoders.towers import UserTower

# The live generation and the one before it: requests that started before a promotion still finish.
KEPT = 2


@dataclass(frozen=True)
class OnlineInterests:
    """vectors: float32 [K, D], unit rows; weights: [K], sum 1. Interests of weight zero are left out."""

    vectors: NDArray[np.float32]
    weights: list[float]


class UserTowers:
    """The user towers of the newest generations, one thread that runs them."""

    def __init__(self) -> None:
        self._towers: OrderedDict[int, UserTower] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="user-tower")

    def __contains__(self, generation: int) -> bool:
        return generation in self._towers

    async def load(self, generation: int, weights: bytes, config: Mapping[str, Any]) -> None:
        """Keeps a generation's tower. Raises UserError when weights and config do not fit."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load, generation, weights, config)

    async def interests(self, generation: int, history: Sequence[NDArray[Any]]) -> OnlineInterests:
        """Interests of one user. history: item embeddings [D], oldest first, at least one."""
        rows = np.stack(history).astype(np.float32)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._interests, generation, rows)

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        self._thread.shutdown(cancel_futures=True)

    def _load(self, generation: int, weights: bytes, config: Mapping[str, Any]) -> None:
        if generation in self._towers:  # another request came first
            return
        import torch

        from encoders.checkpoint import load_user_tower

        torch.set_num_threads(1)  # one history is too little to share: threads would only spin
        self._towers[generation] = load_user_tower(weights, config)
        while len(self._towers) > KEPT:
            self._towers.popitem(last=False)

    def _interests(self, generation: int, rows_TD: NDArray[np.float32]) -> OnlineInterests:
        import torch

        tower = self._towers[generation]
        self._towers.move_to_end(generation)
        with torch.inference_mode():
            items_BTD = torch.from_numpy(rows_TD)[None]
            found = tower.interests(items_BTD, torch.ones(items_BTD.shape[:2], dtype=torch.bool))
        vectors, weights = found.vectors[0].numpy(), found.weights[0].numpy()
        used = weights > 0
        return OnlineInterests(vectors[used], [float(w) for w in weights[used]])

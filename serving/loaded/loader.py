"""What is slow to load (torch, encoders): each once, in the background; no question loses its deadline to an import."""

import asyncio
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serving.errors import LOADING, Problem

Loaded = TypeVar("Loaded")

RETRY_AFTER = 5  # seconds; about what torch takes on two busy cores


class Loader:
    """Loads one thing after another in a thread of its own: two imports at once can see each other half done.

    patience: seconds that a question waits for what it needs; the load itself goes on.
    """

    def __init__(self, *, patience: float) -> None:
        self._patience = patience
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._loads: dict[str, asyncio.Future[Any]] = {}

    def start(self, name: str, load: Callable[[], Loaded]) -> asyncio.Future[Loaded]:
        """The load of this name, which the first call starts."""
        if name not in self._loads:
            loading = self._loads[name] = asyncio.get_running_loop().run_in_executor(self._thread, load)
            # Whoever waited may have gone by the time that it fails.
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._loads[name]

    async def get(self, name: str, load: Callable[[], Loaded]) -> Loaded:
        """What `load` answers. Raises Problem while it is not there.

        Raises what `load` raised, too; the next call then starts it again.
        """
        loading = self.start(name, load)
        await asyncio.wait([loading], timeout=self._patience)
        if not loading.done():
            raise Problem(LOADING, f"{name} is being loaded; try again in a moment", retry_after=RETRY_AFTER)
        if loading.exception() and self._loads.get(name) is loading:
            del self._loads[name]
        return loading.result()

    def forget(self, name: str) -> None:
        """Drops what was loaded under this name; who has it keeps it."""
        self._loads.pop(name, None)

    def start_torch(self) -> asyncio.Future[Any]:
        """As start(): torch, with the code of the towers."""
        return self.start("torch", _import_towers)

    async def torch(self) -> None:
        """As get()."""
        await self.get("torch", _import_towers)

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        self._thread.shutdown(cancel_futures=True)


def _import_towers() -> Any:
    return importlib.import_module("encoders.training.checkpoint")

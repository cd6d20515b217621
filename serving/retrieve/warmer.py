"""`polytower serve --warm`: torch, the user tower and the encoders are loaded before the first question for them.

At the start, which /readyz waits for, and again for each generation that goes live.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import psycopg

from polytower.errors import UserError
from serving import queries
from serving.database import Database
from serving.errors import Problem
from serving.loaded.content_queries import ContentQueries
from serving.loaded.loader import Loader
from serving.retrieve.retrieval import Retrieval

LOG = logging.getLogger(__name__)
INTERVAL = 5.0  # seconds between two looks at which generation is live


class Warmer:
    """Loads whenever another generation is live. done: whether it has loaded for the first time.

    live: the number of the live generation, None for none, or where nobody can tell. load: is given that number.
    """

    def __init__(
        self,
        live: Callable[[], Awaitable[int | None]],
        load: Callable[[int | None], Awaitable[None]],
        *,
        interval: float = INTERVAL,
    ) -> None:
        self._live = live
        self._load = load
        self._interval = interval
        self.done = False

    async def run(self) -> None:
        """Runs until it is cancelled."""
        warm: int | None = None
        while True:
            live = await self._live()
            if not self.done or (live is not None and live != warm):
                await self._load(live)
                warm, self.done = live, True
            await asyncio.sleep(self._interval)


def warmer(database: Database, retrieval: Retrieval, content: ContentQueries, loader: Loader) -> Warmer:
    """For what a server answers with. What cannot be loaded is left to the first question."""

    async def live() -> int | None:
        try:
            async with database.connection() as connection:
                row = await (await connection.execute(queries.READY)).fetchone()
        except (psycopg.Error, Problem):
            return None
        return None if row is None else int(row[0])

    async def load(generation: int | None) -> None:
        await loader.start_torch()
        try:
            if generation is not None:
                async with database.connection() as connection:
                    await retrieval.load_tower(connection, generation)
        except (psycopg.Error, Problem) as error:
            LOG.warning("the user tower is not loaded yet: %s", error)
        try:
            await content.warm()
        except (psycopg.Error, Problem, UserError) as error:
            LOG.warning("questions by text or picture are not prepared: %s", error)

    return Warmer(live, load)

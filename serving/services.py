"""The parts that answer questions, made by one function and closed in reverse order: a server's, or one question's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from polytower.settings import settings
from serving.database import Database
from serving.loaded.content_queries import ContentQueries
from serving.loaded.loader import Loader
from serving.loaded.user_towers import WINDOW, UserTowers
from serving.memory.live_index import LiveIndex
from serving.metrics import ServerMetrics
from serving.rank.feature_service import Features
from serving.rank.ranking import Ranking
from serving.retrieve.retrieval import Retrieval
from serving.retrieve.shadow import Shadow
from serving.retrieve.warmer import Warmer, warmer


@dataclass(frozen=True)
class Services:
    """In the order in which they stand on each other. warmer: None where questions load what they need."""

    metrics: ServerMetrics
    loader: Loader
    database: Database
    towers: UserTowers
    content: ContentQueries
    features: Features
    index: LiveIndex
    shadow: Shadow | None
    retrieval: Retrieval
    ranking: Ranking
    warmer: Warmer | None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside, connections are made and the index is filled. What was opened last is closed first."""
        async with AsyncExitStack() as stack:
            stack.callback(self.loader.close)
            stack.push_async_callback(self.database.close)
            await self.database.open()
            stack.callback(self.towers.close)
            stack.callback(self.content.close)
            stack.callback(self.features.close)
            stack.push_async_callback(self.index.close)
            self.index.refresh()
            if self.shadow is not None:
                stack.push_async_callback(self.shadow.settled)
            if self.warmer is not None:
                stack.callback(asyncio.create_task(self.warmer.run()).cancel)
            yield


def make_services(
    url: str, *, pool: int, timeout: float, patience: float, warm: bool = False, one_question: bool = False
) -> Services:
    """Parts over a migrated database; nothing is connected yet.

    pool: connections. timeout: seconds that a statement may run, and that a question waits for a connection; patience:
    seconds that it waits for torch or an encoder. warm: these are loaded from the start on. one_question: there will be
    no second one, so no index is filled, no answer is sampled, and nobody waits for company.
    """
    config = settings()
    metrics = ServerMetrics()
    loader = Loader(patience=patience)
    database = Database(url, metrics, size=pool, timeout=timeout)
    towers = UserTowers(metrics, loader, window=0 if one_question else WINDOW)
    content = ContentQueries(database, metrics, loader)
    features = Features(url, metrics, timeout=timeout)
    limit = 0 if one_question else config.index_mb << 20
    index = LiveIndex(url, metrics, limit=limit, threads=config.search_threads, kind=config.vector_index)
    shadow = None if one_question else Shadow(database, metrics)
    retrieval = Retrieval(towers, metrics, index, shadow)
    ranking = Ranking(features, metrics)
    warming = warmer(database, retrieval, content, loader) if warm else None
    return Services(
        metrics, loader, database, towers, content, features, index, shadow, retrieval, ranking, warming
    )  # fmt: skip

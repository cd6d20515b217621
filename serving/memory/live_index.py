"""The server's index: filled in the background from the live generation, swapped in whole, never waited for.

A question is answered from it only when the generation and the items' version that the question's own snapshot sees are
those of the index. Otherwise SQL answers, and a new index is on its way.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import psycopg

from serving.memory.fill import TooLarge, load
from serving.memory.item_index import ItemIndex
from serving.memory.vector_index import check_kind
from serving.metrics import ServerMetrics
from serving.queries import Candidates
from serving.question import Interests, Question

LOG = logging.getLogger(__name__)
# Seconds before the next try after one that failed, or was too large.
PATIENCE = 10.0
SEARCHERS = 2


class LiveIndex:
    """Holds one index and replaces it.

    limit: bytes that it may take, 0 for no index at all. threads: of one search. kind: of the vector index; None: the
    one that fits the catalogue's size. Raises UserError for a kind that does not exist.
    """

    def __init__(
        self, url: str, metrics: ServerMetrics, *, limit: int, threads: int = 1, kind: str | None = None
    ) -> None:
        check_kind(kind)
        self._kind = kind
        self._url = url
        self._metrics = metrics
        self._limit = limit
        self._threads = threads
        self._index: ItemIndex | None = None
        self._loading: asyncio.Task[None] | None = None
        self._not_before = 0.0
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="index-load")
        self._searchers = ThreadPoolExecutor(max_workers=SEARCHERS, thread_name_prefix="index-search")

    def current(self, generation: int, version: int) -> ItemIndex | None:
        """The index of exactly this state; None while there is none, and then one is being loaded."""
        index = self._index
        if index is not None and (index.generation, index.version) == (generation, version):
            return index
        self.refresh()
        return None

    def refresh(self) -> None:
        """Starts loading, unless that is going on, was just tried, or is not wanted."""
        idle = self._loading is None or self._loading.done()
        if self._limit and idle and monotonic() >= self._not_before:
            self._loading = asyncio.get_running_loop().create_task(self._load())

    async def settled(self) -> ItemIndex | None:
        """Waits for what is being loaded, and answers the index that serves then."""
        if self._loading is not None:
            await asyncio.shield(self._loading)
        return self._index

    async def answer(self, index: ItemIndex, question: Question, interests: Interests) -> Candidates | None:
        """index.answer(), off the event loop unless it is done in a moment."""
        if index.quick(question, interests):
            return index.answer(question, interests)
        return await asyncio.get_running_loop().run_in_executor(self._searchers, index.answer, question, interests)

    async def close(self) -> None:
        """Ends the threads; a load that is going on is waited for."""
        self._not_before = float("inf")
        if self._loading is not None:
            await asyncio.wait([self._loading])
        self._loader.shutdown()
        self._searchers.shutdown()

    async def _load(self) -> None:
        started = monotonic()
        try:
            index = await asyncio.get_running_loop().run_in_executor(
                self._loader, load, self._url, self._limit, self._kind
            )
            if index is not None:
                index.vector_index.threads = self._threads
            self._index = index
        except TooLarge as reason:
            self._index = None
            self._not_before = monotonic() + PATIENCE
            LOG.warning("no index in memory: %s; SQL answers", reason)
        except (psycopg.Error, ValueError, MemoryError) as error:
            # The index that was there stays: where its state is still the live one, it is right.
            self._not_before = monotonic() + PATIENCE
            LOG.warning("the index in memory could not be loaded; SQL answers: %s", error)
        index, seconds = self._index, monotonic() - started
        if index is None:
            self._metrics.index(generation=0, items=0, size=0, seconds=seconds)
        else:
            self._metrics.index(generation=index.generation, items=len(index), size=index.bytes, seconds=seconds)

"""Is the recall objective still met? Now and then a question that was just answered is asked again, exactly.

The exact answer is Postgres' own, a scan. It is worth at most one part in a hundred of one connection's time: the next
question is not taken before a hundred times what the last one cost has passed, and never sooner than INTERVAL.
"""

import asyncio
import logging
from collections.abc import Mapping
from time import monotonic
from typing import Any

import numpy as np
import psycopg

from serving import queries
from serving.database import Database
from serving.errors import Problem
from serving.metrics import ServerMetrics
from serving.queries import Column

LOG = logging.getLogger(__name__)
INTERVAL = 10.0
SHARE = 0.01


class Shadow:
    """Samples answers of one server. Exported as polytower_shadow_recall."""

    def __init__(self, database: Database, metrics: ServerMetrics, *, interval: float = INTERVAL) -> None:
        """interval: seconds between two samples, at least."""
        self._database = database
        self._metrics = metrics
        self._interval = interval
        self._not_before = monotonic() + interval
        self._asking: asyncio.Task[None] | None = None

    @property
    def due(self) -> bool:
        """Whether it is time for a sample."""
        return monotonic() >= self._not_before and (self._asking is None or self._asking.done())

    def sample(self, by: str, parameters: Mapping[str, Any], scores: Column) -> None:
        """Takes an answer, if it is time for one. parameters: of an exact search."""
        if len(scores) and self.due:
            self._not_before = float("inf")
            self._asking = asyncio.get_running_loop().create_task(self._ask(by, parameters, scores))

    async def settled(self) -> None:
        """Waits for what is being asked."""
        if self._asking is not None:
            await asyncio.wait([self._asking])

    async def _ask(self, by: str, parameters: Mapping[str, Any], scores: Column) -> None:
        started = monotonic()
        try:
            async with (
                self._database.connection() as connection,
                connection.cursor(binary=True) as cursor,
            ):
                await cursor.execute(queries.CANDIDATES_BY_VECTORS, parameters)
                exact = [float(row[1]) for row in await cursor.fetchall()]
            if exact:
                # By score, so that one of two equal items is as good as the other; a rounding apart is equal.
                bar = min(exact) - 1e-6
                self._metrics.recall(by, min(1.0, float(np.count_nonzero(scores >= bar)) / len(exact)))
        except (psycopg.Error, Problem) as error:
            LOG.info("a shadow query failed (%s)", type(error).__name__)
        finally:
            self._not_before = monotonic() + max(self._interval, (monotonic() - started) / SHARE)

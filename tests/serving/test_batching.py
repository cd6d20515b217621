"""Concurrent questions become one forward pass; nobody gets another's answer, and nobody waits for the absent."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig
from encoders.towers.towers import Towers
from encoders.training.checkpoint import user_tower_bytes
from serving.loaded.batching import Batcher
from serving.loaded.loader import Loader
from serving.loaded.user_towers import History, UserTowers
from serving.metrics import ServerMetrics


def _doubled(numbers: Sequence[int]) -> list[int]:
    if -1 in numbers:
        raise ValueError("minus one")
    return [2 * number for number in numbers]


@settings(deadline=None, max_examples=25)
@given(numbers=st.lists(st.integers(0, 1000), min_size=1, max_size=40), size=st.integers(1, 7))
def test_everybody_gets_his_own_answer(numbers: list[int], size: int) -> None:
    runs: list[int] = []

    async def ask() -> list[int]:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(_doubled, thread, window=0.001, size=size, observe=runs.append)
            return await asyncio.gather(*map(batcher.ask, numbers))

    assert asyncio.run(ask()) == [2 * number for number in numbers]
    assert sum(runs) == len(numbers)
    assert max(runs) <= size
    assert len(runs) == -(-len(numbers) // size)


def test_a_failure_is_the_failure_of_its_batch_alone() -> None:
    async def ask() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(_doubled, thread, window=0.001, size=8, observe=lambda _: None)
            failed = await asyncio.gather(batcher.ask(1), batcher.ask(-1), return_exceptions=True)
            assert [type(each) for each in failed] == [ValueError, ValueError]
            assert await batcher.ask(4) == 8

    asyncio.run(ask())


def test_who_gave_up_is_not_computed() -> None:
    """A thread that is busy, one caller that goes away meanwhile: the next run is without him."""
    runs: list[int] = []
    busy = threading.Event()

    def run(numbers: Sequence[int]) -> list[int]:
        assert busy.wait(10)
        return list(numbers)

    async def ask() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(run, thread, window=0, size=8, observe=runs.append)
            first = asyncio.create_task(batcher.ask(1))
            while not runs:
                await asyncio.sleep(0)
            gone, stays = asyncio.create_task(batcher.ask(2)), asyncio.create_task(batcher.ask(3))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.sleep(0)
            busy.set()
            assert await asyncio.gather(first, stays) == [1, 3]

    asyncio.run(ask())
    assert runs == [1, 1]


def test_a_batch_of_histories_is_what_each_would_get_alone() -> None:
    torch.manual_seed(0)
    catalogue = Catalogue(["a", "b"], {}, {})
    towers = Towers(TowersConfig(dim=8, interests=3), catalogue).eval()
    weights, config = user_tower_bytes(towers)
    random = np.random.default_rng(0)
    histories = [list(random.standard_normal((n, 8)).astype(np.float16)) for n in (1, 7, 30, 2, 60)]
    metrics = ServerMetrics()

    async def ask(window: float) -> list[np.ndarray]:
        online = UserTowers(metrics, Loader(patience=60), window=window)
        await online.load(1, weights, config)
        together = await asyncio.gather(*(online.interests(History(1, history, None)) for history in histories))
        alone = [await online.interests(History(1, history, None)) for history in histories]
        online.close()
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-5)
            np.testing.assert_allclose(one.weights, other.weights, atol=1e-5)
        return [found.vectors for found in together]

    asyncio.run(ask(0.05))
    passes = metrics.registry.get_sample_value("polytower_batch_size_count", {"model": "tower"})
    assert passes == 1 + len(histories)  # five at once are one pass; five in turn are five

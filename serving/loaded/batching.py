"""Concurrent calls become one run: what arrives while the thread is busy, or within a moment, is computed together."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class Batcher(Generic[Asked, Answered]):
    """Calls `run` in the thread with the questions of several callers; each gets its own answer.

    run: questions → as many answers, in order; what it raises, every caller of that batch gets. window: seconds that an
    idle batcher waits for company, if the run before had any: somebody who is alone never waits. What arrives during a
    run goes into the next one at once. size: questions of one run. observe: is told the size of each run.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Asked]], Sequence[Answered]],
        thread: ThreadPoolExecutor,
        *,
        window: float,
        size: int,
        observe: Callable[[int], None],
    ) -> None:
        self._run = run
        self._thread = thread
        self._window = window
        self._size = size
        self._observe = observe
        self._waiting: list[tuple[Asked, asyncio.Future[Answered]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._crowded = False

    async def ask(self, question: Asked) -> Answered:
        """The answer to one question. A caller that gives up is left out of the batch if it has not begun."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answered] = loop.create_future()
        self._waiting.append((question, future))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await future

    async def _work(self) -> None:
        if self._crowded and self._window and len(self._waiting) < self._size:
            await asyncio.sleep(self._window)
        while self._waiting:
            wanted = [pair for pair in self._waiting if not pair[1].done()]
            batch, self._waiting = wanted[: self._size], wanted[self._size :]
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: list[tuple[Asked, "asyncio.Future[Answered]"]]) -> None:
        self._crowded = len(batch) > 1
        self._observe(len(batch))
        questions = [question for question, _ in batch]
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, questions)
        await asyncio.wait([running])
        error = running.exception()
        answers = [] if error else running.result()
        assert error or len(answers) == len(batch)
        for place, (_, future) in enumerate(batch):
            if future.done():  # its caller has gone
                continue
            if error:
                future.set_exception(error)
            else:
                future.set_result(answers[place])

"""Threads that turn request bodies into prompts, one image at a time, so that no request holds up the others."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

from lmfusion.serving.errors import shutting_down

T = TypeVar("T")

NUM_THREADS = 4
"""Number of threads. Each may hold one decoded image of the largest size allowed."""


class _Job(NamedTuple):
    work: Generator[None, None, Any]
    outcome: asyncio.Future[tuple[bool, Any]]
    """(whether the work is finished, its result if it is)"""
    loop: asyncio.AbstractEventLoop


class ParsingThreads:
    """Daemon threads, so that they do not keep the process from exiting.

    Work is a generator that yields between its steps. Each step goes to the end of the queue, behind the steps of other
    requests. A step is skipped if nobody waits for the result any longer.
    """

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._num_threads = num_threads
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._outcomes: set[asyncio.Future[tuple[bool, Any]]] = set()
        self._is_closed = False

    async def run(self, work: Generator[None, None, T]) -> T:
        """Run all steps of `work` and return its result.

        Raises:
            ApiError: after `close`.
            Exception: what `work` raises.
        """
        loop = asyncio.get_running_loop()
        is_finished, result = False, None
        while not is_finished:
            if self._is_closed:
                raise shutting_down()
            outcome: asyncio.Future[tuple[bool, Any]] = loop.create_future()
            self._outcomes.add(outcome)
            try:
                self._start_threads()
                self._jobs.put(_Job(work, outcome, loop))
                is_finished, result = await outcome
            finally:
                self._outcomes.discard(outcome)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """End the threads; callers that wait for a result get an ApiError. Call it in the event loop's thread."""
        self._is_closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for outcome in self._outcomes:
            if not outcome.done():
                outcome.set_exception(shutting_down())

    def _start_threads(self) -> None:
        if not self._threads:
            name = "lmfusion-parser"
            self._threads = [
                threading.Thread(target=self._work, name=name, daemon=True) for _ in range(self._num_threads)
            ]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.outcome.cancelled():
                continue
            outcome: tuple[bool, Any] | Exception
            try:
                next(job.work)
                outcome = (False, None)
            except StopIteration as end:
                outcome = (True, end.value)
            except Exception as error:
                outcome = error
            with contextlib.suppress(RuntimeError):  # the event loop has been closed
                job.loop.call_soon_threadsafe(_set_outcome, job.outcome, outcome)
            # Free both before waiting for the next job: they may be large and the wait long.
            del job, outcome


def _set_outcome(future: asyncio.Future[tuple[bool, Any]], outcome: tuple[bool, Any] | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)

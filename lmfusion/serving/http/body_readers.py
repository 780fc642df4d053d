"""Threads that turn bodies into prompts, a piece at a time, so that no request keeps others waiting for long."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Coroutine, Generator
from typing import Any, NamedTuple, TypeVar

from starlette.types import Receive

from lmfusion.serving.http.bodies import hung_up, stopping

T = TypeVar("T")

NUM_READERS = 4
"""Pieces worked on at a time; each may hold one decoded image of the largest size allowed."""


class _Job(NamedTuple):
    work: Generator[None, None, Any]
    outcome: asyncio.Future[tuple[bool, Any]]
    """Whether the work is finished, and its result if so."""
    loop: asyncio.AbstractEventLoop


class Readers:
    """Daemon threads, which do not keep the process from ending.

    Work is a generator that yields between its pieces. Each piece is queued anew, behind those of other requests, and
    is not begun where nobody waits for the result any more.
    """

    def __init__(self, num_threads: int = NUM_READERS) -> None:
        self._num_threads = num_threads
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._outcomes: set[asyncio.Future[tuple[bool, Any]]] = set()
        self._is_closed = False

    async def finish(self, work: Generator[None, None, T]) -> T:
        """What `work` returns. Raises what it raises; ApiError after `close`."""
        loop = asyncio.get_running_loop()
        is_finished, result = False, None
        while not is_finished:
            if self._is_closed:
                raise stopping()
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
        """End the threads, and what waits for them with an ApiError. In the event loop's thread."""
        self._is_closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for outcome in self._outcomes:
            if not outcome.done():
                outcome.set_exception(stopping())

    def _start_threads(self) -> None:
        if not self._threads:
            name = "lmfusion-reader"
            self._threads = [
                threading.Thread(target=self._run, name=name, daemon=True) for _ in range(self._num_threads)
            ]
            for thread in self._threads:
                thread.start()

    def _run(self) -> None:
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
            with contextlib.suppress(RuntimeError):  # the event loop has ended meanwhile
                job.loop.call_soon_threadsafe(_settle, job.outcome, outcome)
            del job, outcome  # which may be large, and the next one may be long in coming


def _settle(future: asyncio.Future[tuple[bool, Any]], outcome: tuple[bool, Any] | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. It is cancelled, and ApiError raised, when the client hangs up."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not working.done():
            working.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
    if working.cancelled():
        raise hung_up()
    return working.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

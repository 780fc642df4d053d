"""How do many callers share one engine? One thread owns it; every other thread submits, listens and cancels.

The thread sleeps while there is nothing to do. A request that fails ends in Done("error") for itself; where a whole
step of the engine fails, the requests it was working on end so, and the next ones find it at work again.
"""

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lmfusion.generation.events import Done, Event, ImageBegin, ImageEnd

if TYPE_CHECKING:
    from lmfusion.generation.engine import Engine
    from lmfusion.generation.options import GenerationOptions
    from lmfusion.generation.prompt import Prompt

MAX_FAILED_STEPS = 3
"""Steps that fail one after the other before the worker gives up: the device, and not a request, is at fault."""

logger = logging.getLogger(__name__)


class QueueFull(Exception):  # noqa: N818
    """As many requests wait as may; the text says how many, and what to do."""


class Stopped(Exception):  # noqa: N818
    """The worker was closed, or gave up; the text says why."""


@dataclass(frozen=True)
class WorkerStats:
    """What a worker is doing, and has done since it was started."""

    num_waiting: int
    num_running: int
    num_rows: int
    """Rows of the engine's key-value cache."""
    num_rows_used: int
    num_finished: dict[str, int] = field(default_factory=dict)
    """Requests by finish_reason."""
    num_rejected: int = 0
    """Requests that were answered with QueueFull."""
    num_prompt_tokens: int = 0
    """Of finished requests, rows of images included."""
    num_new_tokens: int = 0
    """Text tokens of finished requests."""
    num_images: int = 0
    num_denoise_steps: int = 0
    """Of finished images; the branches of guidance do not count apart."""
    problem: str = ""
    """Why nothing can be submitted any more; "" while all is well."""


class ResponseStream:
    """An answer under way. Iterating gives its events and ends after Done; leaving the loop before that cancels it.

    One thread may iterate, once. A request that was submitted with `on_event` has its events called there alone.
    """

    def __init__(self, worker: "EngineWorker", on_event: Callable[[Event], None] | None) -> None:
        self._worker = worker
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._tell = self._events.put if on_event is None else on_event
        self._has_ended = on_event is not None
        self._num_images = 0  # this and the next are the worker's
        self._image_steps = 0

    def __iter__(self) -> Iterator[Event]:
        try:
            while not self._has_ended:
                event = self._events.get()
                self._has_ended = isinstance(event, Done)
                yield event
        finally:
            if not self._has_ended:
                self._has_ended = True
                self.cancel()

    def cancel(self) -> None:
        """End the answer with Done("cancelled") and free its rows, before the engine's next step. From any thread."""
        self._worker._cancel(self)


@dataclass
class _Submission:
    prompt: "Prompt"
    options: "GenerationOptions"
    answering: ResponseStream
    accepted: Future[None] = field(default_factory=Future)


class EngineWorker:
    """The thread that owns `engine`. To be closed when done with; at most `max_waiting` requests wait for their turn.

    Raises ValueError for a max_waiting below 1.
    """

    def __init__(self, engine: "Engine", max_waiting: int = 64) -> None:
        if max_waiting < 1:
            raise ValueError(f"max_waiting is {max_waiting}; it must be at least 1")
        self.engine = engine
        self.max_waiting = max_waiting
        self._wake = threading.Condition()  # guards everything down to _stats
        self._submissions: list[_Submission] = []
        self._cancellations: list[ResponseStream] = []
        self._num_arriving = 0  # submitted, and not yet among the engine's waiting ones in _stats
        self._num_rejected = 0
        self._problem = ""
        self._stats = WorkerStats(0, 0, engine.num_rows, 0)
        # The rest is the thread's own
        self._answerings: dict[int, ResponseStream] = {}
        self._finished: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._num_failed_steps = 0
        self._thread = threading.Thread(target=self._run, name="lmfusion-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: "Prompt",
        options: "GenerationOptions",
        on_event: Callable[[Event], None] | None = None,
    ) -> ResponseStream:
        """Queue a request; returns when the engine has accepted it, which takes a step of the engine at most.

        on_event: called in the worker's thread with every event. It must not block, nor submit; one that raises has
        its request cancelled.

        Raises ValueError where the request can never be answered, QueueFull where too many wait, Stopped after `close`.
        """
        submission = _Submission(prompt, options, ResponseStream(self, on_event))
        with self._wake:
            self._check_usable()
            num_waiting = self._stats.num_waiting + self._num_arriving
            if num_waiting >= self.max_waiting:
                self._num_rejected += 1
                raise QueueFull(f"{num_waiting} requests are waiting, and no more may; try again in a few seconds")
            self._num_arriving += 1
            self._submissions.append(submission)
            self._wake.notify()
        submission.accepted.result()
        return submission.answering

    def stats(self) -> WorkerStats:
        """Counts as of the last step."""
        with self._wake:
            return replace(
                self._stats,
                num_waiting=self._stats.num_waiting + self._num_arriving,
                num_rejected=self._num_rejected,
                problem=self._problem,
            )

    def close(self) -> None:
        """Cancel everything and end the thread; every answer gets its Done before this returns."""
        with self._wake:
            self._problem = self._problem or "the engine was closed"
            self._wake.notify()
        self._thread.join()

    def _check_usable(self) -> None:
        if self._problem:
            raise Stopped(f"{self._problem}; nothing can be submitted any more")
        if threading.current_thread() is self._thread:
            raise RuntimeError("on_event cannot submit: it runs in the thread that would have to answer")

    def _cancel(self, answering: ResponseStream) -> None:
        with self._wake:
            self._cancellations.append(answering)
            self._wake.notify()

    # --- the thread ---

    def _run(self) -> None:
        problem = "the engine's thread has ended"
        try:
            while self._take_orders():
                if self._answerings:
                    self._step()
        except BaseException as error:
            logger.exception("the engine has failed for good")
            problem = f"the engine has failed ({_describe(error)}); start it again"
        finally:
            self._end(problem)

    def _take_orders(self) -> bool:
        """Wait for something to do, hand it to the engine; False when it is time to end."""
        with self._wake:
            while not (self._submissions or self._cancellations or self._answerings or self._problem):
                self._wake.wait()
            if self._problem:
                return False
            submissions, self._submissions = self._submissions, []
            cancellations, self._cancellations = self._cancellations, []
        for submission in submissions:
            try:
                request_id = self.engine.submit(submission.prompt, submission.options)
            except Exception as error:
                submission.accepted.set_exception(error)
            else:
                self._answerings[request_id] = submission.answering
                submission.accepted.set_result(None)
        cancelled = {id(answering) for answering in cancellations}
        for request_id, answering in self._answerings.items():
            if id(answering) in cancelled:
                self.engine.cancel(request_id)
        with self._wake:
            self._publish()
            self._num_arriving -= len(submissions)
        return True

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:
            logger.exception("a step of the engine failed")
            self._num_failed_steps += 1
            running = [i for i in self.engine.running_ids if i in self._answerings]
            # Where none had begun, it was one of those that wait
            self._drop(running or list(self._answerings), f"the engine failed: {_describe(error)}")
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                raise
            return
        self._num_failed_steps = 0
        self._pass_on(events)
        if not (events or self.engine.num_waiting or self.engine.num_running):
            self._drop(list(self._answerings), "the engine ended without an answer")  # nobody shall wait for ever

    def _pass_on(self, events: Sequence[tuple[int, Event]]) -> None:
        """Count events, and then tell them: who hears of an end finds it counted."""
        heard = [(self._answerings[i], event) for i, event in events if i in self._answerings]
        for answering, event in heard:
            match event:
                case ImageBegin():
                    answering._image_steps = event.num_steps
                case ImageEnd():
                    answering._num_images += 1
                    self._totals["num_images"] += 1
                    self._totals["num_denoise_steps"] += answering._image_steps
                case Done():
                    self._finished[event.finish_reason] += 1
                    self._totals["num_prompt_tokens"] += event.num_prompt_tokens
                    self._totals["num_new_tokens"] += event.num_new_tokens
        for request_id, event in events:
            if isinstance(event, Done):
                self._answerings.pop(request_id, None)
        self._publish()
        for answering, event in heard:
            try:
                answering._tell(event)
            except Exception:
                logger.exception("a listener failed; its request is cancelled")
                answering.cancel()

    def _drop(self, request_ids: Sequence[int], error: str, finish_reason: str = "error") -> None:
        """End these requests, here and in the engine."""
        for request_id in request_ids:
            try:
                self.engine.cancel(request_id)
            except Exception:
                logger.exception("a request could not be cancelled")
        self._pass_on(
            [
                (request_id, Done(finish_reason, 0, 0, self._answerings[request_id]._num_images, 0.0, error))
                for request_id in request_ids
            ]
        )

    def _publish(self) -> None:
        engine = self.engine
        stats = WorkerStats(
            engine.num_waiting,
            engine.num_running,
            engine.num_rows,
            engine.num_rows_used,
            num_finished=dict(self._finished),
            num_prompt_tokens=self._totals["num_prompt_tokens"],
            num_new_tokens=self._totals["num_new_tokens"],
            num_images=self._totals["num_images"],
            num_denoise_steps=self._totals["num_denoise_steps"],
        )
        with self._wake:
            self._stats = stats

    def _end(self, problem: str) -> None:
        """Refuse what comes, and end what is there: cancelled after `close`, as failed otherwise."""
        with self._wake:
            is_closed = bool(self._problem)
            self._problem = self._problem or problem
            submissions, self._submissions = self._submissions, []
            self._num_arriving = 0
        for submission in submissions:
            submission.accepted.set_exception(Stopped(self._problem))
        if is_closed:
            self._cancel_all()
        self._drop(list(self._answerings), problem)

    def _cancel_all(self) -> None:
        """Every request with the counts that the engine knows."""
        try:
            for request_id in self._answerings:
                self.engine.cancel(request_id)
            self._pass_on(self.engine.step() if self._answerings else [])
        except Exception:
            logger.exception("requests could not be cancelled")
        self._drop(list(self._answerings), "", "cancelled")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

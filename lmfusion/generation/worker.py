"""EngineWorker: one thread owns an engine; all other threads submit requests, receive events and cancel.

The thread sleeps while there is nothing to do. A request that fails ends in Done("error") alone. If a whole step of the
engine fails, all running requests end in Done("error"), and the worker continues with the next ones.
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
"""The worker gives up after this many failed steps in a row: the device is at fault then, not a request."""

logger = logging.getLogger(__name__)


class QueueFull(Exception):  # noqa: N818
    """The queue is full. The message gives its size and what to do."""


class Stopped(Exception):  # noqa: N818
    """The worker was closed, or has given up. The message says why."""


@dataclass(frozen=True)
class WorkerStats:
    """What a worker is doing, and what it has done since it was started."""

    num_waiting: int
    num_running: int
    num_slots: int
    """Slots of the engine's key-value cache."""
    num_slots_used: int
    num_finished: dict[str, int] = field(default_factory=dict)
    """Requests by finish_reason."""
    num_rejected: int = 0
    """Requests that were refused with QueueFull."""
    num_prompt_tokens: int = 0
    """Of finished requests, including the tokens of their images."""
    num_new_tokens: int = 0
    """Text tokens of finished requests."""
    num_images: int = 0
    num_denoise_steps: int = 0
    """Of finished images; a step counts once, whatever its branches of guidance."""
    problem: str = ""
    """Why nothing can be submitted any more; "" while the worker runs."""


class ResponseStream:
    """The events of one answer. Iteration ends after Done; leaving the loop before that cancels the answer.

    One thread may iterate, once. If the request was submitted with `on_event`, its events go there and not here.
    """

    def __init__(self, worker: "EngineWorker", on_event: Callable[[Event], None] | None) -> None:
        self._worker = worker
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deliver = self._events.put if on_event is None else on_event
        self._has_ended = on_event is not None
        self._num_images = 0  # this and the next belong to the worker's thread
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
        """End the answer with Done("cancelled") and free its slots before the engine's next step. From any thread."""
        self._worker._cancel(self)


@dataclass
class _Submission:
    prompt: "Prompt"
    options: "GenerationOptions"
    stream: ResponseStream
    accepted: Future[None] = field(default_factory=Future)


class EngineWorker:
    """The thread that owns `engine`. Call `close` at the end. At most `max_waiting` requests wait in the queue.

    Raises ValueError for a max_waiting below 1.
    """

    def __init__(self, engine: "Engine", max_waiting: int = 64) -> None:
        if max_waiting < 1:
            raise ValueError(f"max_waiting must be at least 1, got {max_waiting}")
        self.engine = engine
        self.max_waiting = max_waiting
        self._changed = threading.Condition()  # guards all attributes down to _stats
        self._submissions: list[_Submission] = []
        self._cancellations: list[ResponseStream] = []
        self._num_arriving = 0  # submitted, but not yet counted among the waiting ones in _stats
        self._num_rejected = 0
        self._problem = ""
        self._stats = WorkerStats(0, 0, engine.num_slots, 0)
        # Only the worker's thread uses the rest
        self._streams: dict[int, ResponseStream] = {}
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
        """Queue a request. Returns when the engine has accepted it, which takes one step of the engine at most.

        on_event: called in the worker's thread with every event. It must not block and must not submit. If it raises,
        its request is cancelled.

        Raises ValueError if the request can never be answered, QueueFull if too many wait, Stopped after `close`.
        """
        submission = _Submission(prompt, options, ResponseStream(self, on_event))
        with self._changed:
            self._check_usable()
            num_waiting = self._stats.num_waiting + self._num_arriving
            if num_waiting >= self.max_waiting:
                self._num_rejected += 1
                raise QueueFull(f"{num_waiting} requests are waiting, which is the limit; try again in a few seconds")
            self._num_arriving += 1
            self._submissions.append(submission)
            self._changed.notify()
        submission.accepted.result()  # outside the lock: the worker's thread needs it to accept
        return submission.stream

    def stats(self) -> WorkerStats:
        """The counts after the last step."""
        with self._changed:
            return replace(
                self._stats,
                num_waiting=self._stats.num_waiting + self._num_arriving,
                num_rejected=self._num_rejected,
                problem=self._problem,
            )

    def close(self) -> None:
        """Cancel all requests and end the thread. Every answer has got its Done when this returns."""
        with self._changed:
            self._problem = self._problem or "the engine was closed"
            self._changed.notify()
        self._thread.join()

    def _check_usable(self) -> None:
        if self._problem:
            raise Stopped(f"{self._problem}; nothing can be submitted any more")
        if threading.current_thread() is self._thread:
            raise RuntimeError("on_event must not submit: it runs in the thread that would have to accept the request")

    def _cancel(self, stream: ResponseStream) -> None:
        with self._changed:
            self._cancellations.append(stream)
            self._changed.notify()

    # --- the thread ---

    def _run(self) -> None:
        problem = "the engine's thread has ended"
        try:
            while self._take_work():
                if self._streams:
                    self._step()
        except BaseException as error:
            logger.exception("the engine has failed for good")
            problem = f"the engine has failed ({_describe(error)}); start it again"
        finally:
            self._end(problem)

    def _take_work(self) -> bool:
        """Wait for something to do and hand it to the engine. False when the thread must end."""
        with self._changed:
            while not (self._submissions or self._cancellations or self._streams or self._problem):
                self._changed.wait()
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
                self._streams[request_id] = submission.stream
                submission.accepted.set_result(None)
        # After the submissions: a request may have been submitted and cancelled between two steps
        cancelled = {id(stream) for stream in cancellations}
        for request_id, stream in self._streams.items():
            if id(stream) in cancelled:
                self.engine.cancel(request_id)
        with self._changed:
            self._publish()
            self._num_arriving -= len(submissions)
        return True

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:
            logger.exception("a step of the engine failed")
            self._num_failed_steps += 1
            running = [i for i in self.engine.running_ids if i in self._streams]
            # If none was running, a waiting one failed as it started; which one is unknown
            self._drop(running or list(self._streams), f"the engine failed: {_describe(error)}")
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                raise
            return
        self._num_failed_steps = 0
        self._deliver(events)
        if not (events or self.engine.num_waiting or self.engine.num_running):
            self._drop(list(self._streams), "the engine ended without an answer")  # or their callers would wait forever

    def _deliver(self, events: Sequence[tuple[int, Event]]) -> None:
        """Count events, then deliver them: a caller that gets a Done finds it in the counts already."""
        wanted = [(self._streams[i], event) for i, event in events if i in self._streams]
        for stream, event in wanted:
            match event:
                case ImageBegin():
                    stream._image_steps = event.num_steps
                case ImageEnd():
                    stream._num_images += 1
                    self._totals["num_images"] += 1
                    self._totals["num_denoise_steps"] += stream._image_steps
                case Done():
                    self._finished[event.finish_reason] += 1
                    self._totals["num_prompt_tokens"] += event.num_prompt_tokens
                    self._totals["num_new_tokens"] += event.num_new_tokens
        for request_id, event in events:
            if isinstance(event, Done):
                self._streams.pop(request_id, None)
        self._publish()
        for stream, event in wanted:
            try:
                stream._deliver(event)
            except Exception:
                logger.exception("on_event failed; its request is cancelled")
                stream.cancel()

    def _drop(self, request_ids: Sequence[int], error: str, finish_reason: str = "error") -> None:
        """End these requests here and in the engine."""
        for request_id in request_ids:
            try:
                self.engine.cancel(request_id)
            except Exception:
                logger.exception("a request could not be cancelled")
        self._deliver(
            [
                (request_id, Done(finish_reason, 0, 0, self._streams[request_id]._num_images, 0.0, error))
                for request_id in request_ids
            ]
        )

    def _publish(self) -> None:
        engine = self.engine
        stats = WorkerStats(
            engine.num_waiting,
            engine.num_running,
            engine.num_slots,
            engine.num_slots_used,
            num_finished=dict(self._finished),
            num_prompt_tokens=self._totals["num_prompt_tokens"],
            num_new_tokens=self._totals["num_new_tokens"],
            num_images=self._totals["num_images"],
            num_denoise_steps=self._totals["num_denoise_steps"],
        )
        with self._changed:
            self._stats = stats

    def _end(self, problem: str) -> None:
        """Refuse new requests and end the running ones: as cancelled after `close`, as failed otherwise."""
        with self._changed:
            is_closed = bool(self._problem)
            self._problem = self._problem or problem
            submissions, self._submissions = self._submissions, []
            self._num_arriving = 0
        for submission in submissions:
            submission.accepted.set_exception(Stopped(self._problem))
        if is_closed:
            self._cancel_all()
        self._drop(list(self._streams), problem)

    def _cancel_all(self) -> None:
        """Cancel every request in the engine, whose Done has the right counts."""
        try:
            for request_id in self._streams:
                self.engine.cancel(request_id)
            self._deliver(self.engine.step() if self._streams else [])
        except Exception:
            logger.exception("requests could not be cancelled")
        self._drop(list(self._streams), "", "cancelled")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

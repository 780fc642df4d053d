"""The log of a run's steps: metrics.jsonl, the progress bar, and the time that steps take."""

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from lmfusion.utils.json_lines import JsonLines

StepT = TypeVar("StepT")
T = TypeVar("T")


class Stopwatch:
    """Seconds of training since the last `lap`, and how many of them were spent waiting for data."""

    def __init__(self, seconds: float = 0.0, data_wait: float = 0.0) -> None:
        self._seconds = seconds
        self._data_wait = data_wait
        self._since: float | None = None

    def start(self) -> None:
        """Count time from now on."""
        self._since = time.perf_counter()

    def elapsed(self) -> tuple[float, float]:
        """Seconds, and those spent waiting for data."""
        if self._since is not None:
            now = time.perf_counter()
            self._seconds, self._since = self._seconds + now - self._since, now
        return self._seconds, self._data_wait

    def lap(self) -> tuple[float, float]:
        """Like `elapsed`, then start again from zero."""
        elapsed = self.elapsed()
        self._seconds = self._data_wait = 0.0
        return elapsed

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside."""
        self.elapsed()
        yield
        self.start()


class StepLog(Generic[StepT]):
    """Gathers the metrics of steps, and writes one line of metrics.jsonl for many of them.

    step_type: the dataclass of one step's metrics. is_writer: whether this process writes the file and shows the bar;
    the other ranks only count.
    """

    def __init__(self, folder: Path, step_type: type[StepT], is_writer: bool = True) -> None:
        self.stopwatch = Stopwatch()
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._step_type = step_type
        self._is_writer = is_writer
        self._gathered: list[StepT] = []
        self._bar: Any = None

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a checkpoint."""
        self._gathered = [self._step_type(**values) for values in state["gathered"]]
        self.stopwatch = Stopwatch(*state["seconds"])

    def state(self) -> dict[str, Any]:
        """What has been gathered since the last line, as JSON values. The lines so far are forced onto the disk."""
        self._metrics.sync()
        gathered = [dataclasses.asdict(step) for step in self._gathered]  # type: ignore[call-overload]
        return {"gathered": gathered, "seconds": self.stopwatch.elapsed()}

    def open(self, step: int, last: int) -> None:
        """Begin after `step` of `last` steps: drop lines of later steps, show the bar and count time."""
        if self._is_writer:
            self._metrics.resume(step)
        interval = 1 if sys.stderr.isatty() else 30
        self._bar = tqdm(total=last, initial=step, unit="step", mininterval=interval, disable=not self._is_writer)
        self.stopwatch.start()

    def close(self) -> None:
        self._metrics.close()
        if self._bar is not None:
            self._bar.close()

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; the time until each one comes counts as waiting for data."""
        while True:
            with self.stopwatch.waiting():
                item = next(items, None)
            if item is None:
                return
            yield item

    def gather(self, steps: Sequence[StepT]) -> None:
        """Add steps to those that the next line summarises."""
        self._gathered += steps

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._bar.update()

    def take(self) -> tuple[list[StepT], float, float]:
        """The steps since the last line, their seconds, and how many of these were spent waiting for data."""
        steps, self._gathered = self._gathered, []
        return steps, *self.stopwatch.lap()

    def write(self, line: Any, **shown: str) -> None:
        """Append the dataclass `line` to metrics.jsonl, and show `shown` beside the progress bar."""
        if self._is_writer:
            self._metrics.append(dataclasses.asdict(line))
            self._bar.set_postfix(shown, refresh=False)

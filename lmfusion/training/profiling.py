"""Records a trace of a few steps with torch.profiler."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def profiled(steps: Sequence[int] | None, folder: Path, rank: int) -> Iterator["Profiler"]:
    """Records `steps` (first and last number; None: nothing) into `folder`."""
    profiler = Profiler(steps, folder / f"trace-rank-{rank}.json")
    try:
        yield profiler
    finally:
        profiler.stop()


class Profiler:
    """Starts recording before the first of `steps`, and writes the trace to `path` after the last, or on `stop`.

    Open the trace at https://ui.perfetto.dev or chrome://tracing.
    """

    def __init__(self, steps: Sequence[int] | None, path: Path) -> None:
        self._first, self._last = steps if steps is not None else (0, 0)
        self._path = path
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Call it before each step. step: the number of the step about to be made, from 1."""
        if self._profile is not None and step > self._last:
            self.stop()
        if self._profile is None and self._first <= step <= self._last:
            from torch.profiler import ProfilerActivity, profile, supported_activities

            wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()
            self._profile = profile(activities=wanted, record_shapes=True)
            self._profile.start()

    def stop(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None

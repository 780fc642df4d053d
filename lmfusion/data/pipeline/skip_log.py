"""Names and counts the damaged samples that a run skips, and stops the run when there are too many."""

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmfusion.data.pipeline.documents import SkippedSample
from lmfusion.utils.json_lines import JsonLines
from lmfusion.utils.printing import escape_line

MIN_COUNTED = 1000
"""The share of damaged samples is taken of at least this number, so that an early one does not end a run."""
NUM_NAMED = 3


def check_damaged_share(num_damaged: int, num_samples: int, max_damaged: float, last: str) -> None:
    """Raise ValueError where more than the share `max_damaged` of the samples is damaged. last: the last of them."""
    if num_damaged > max_damaged * max(num_samples, MIN_COUNTED):
        raise ValueError(
            f"the share of damaged samples must be at most data.max_damaged, {max_damaged:g}, got {num_damaged} of "
            f"{num_samples} samples; repair them, or raise data.max_damaged. The last: {last}"
        )


class SkipLog:
    """Counts over all ranks, and the file `path` with a line {"step", "sample_id", "reason"} for each skipped sample.

    Each rank has a log and a file of its own, with its own samples. A sample is also printed to stderr the first time.
    """

    def __init__(self, path: str | Path, max_damaged: float) -> None:
        self.num_samples = 0
        """Samples read so far, by all ranks."""
        self.num_damaged = 0
        """How many of them were damaged, and skipped."""
        self._lines = JsonLines(Path(path))
        self._max_damaged = max_damaged
        self._printed: set[str] = set()
        self._last: deque[SkippedSample] = deque(maxlen=NUM_NAMED)

    def add(
        self, step: int, num_samples: int, damaged: Sequence[SkippedSample], num_damaged: int | None = None
    ) -> None:
        """Count one step: `num_samples` samples of all ranks, `damaged` of this rank, `num_damaged` of all.

        num_damaged: None if this rank is the only one. Raises ValueError, on all ranks in the same step, when more than
        the share `max_damaged` of the samples so far (1,000 at least) is damaged, or all of 1,000 or more are.
        """
        self.num_samples += num_samples
        self.num_damaged += len(damaged) if num_damaged is None else num_damaged
        for sample_id, reason in damaged:
            self._lines.append({"step": step, "sample_id": sample_id, "reason": reason})
            if sample_id not in self._printed:
                self._printed.add(sample_id)
                print(escape_line(f"skipped, damaged: {sample_id}: {reason}"), file=sys.stderr)
        self._last.extend(damaged)
        last = f"{self._named()}. Earlier ones are in {self._lines.path}"
        check_damaged_share(self.num_damaged, self.num_samples, self._max_damaged, last)
        if self.num_samples >= MIN_COUNTED:
            self.check_any_good()

    def check_any_good(self) -> None:
        """Raises ValueError where every sample so far was damaged, whatever share is allowed: nothing was learned."""
        if self.num_damaged == self.num_samples > 0:
            raise ValueError(
                f"all {self.num_samples} samples read so far are damaged, and nothing was learned; run `lmfusion data "
                f"check` to see what is wrong with them. The last: {self._named()}"
            )

    def _named(self) -> str:
        last = (escape_line(f"{sample_id}: {reason}") for sample_id, reason in self._last)
        return "; ".join(last) or "found by another rank, or before this start"

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint. The lines so far are on the disk when this returns."""
        self._lines.sync()
        return {"num_samples": self.num_samples, "num_damaged": self.num_damaged}

    def resume(self, step: int, state: Mapping[str, int]) -> None:
        """Continue after `step` with its `state`, and drop lines of later steps. Without a checkpoint: 0 and {}."""
        self.num_samples, self.num_damaged = state.get("num_samples", 0), state.get("num_damaged", 0)
        self._lines.resume(step)

    def close(self) -> None:
        self._lines.close()

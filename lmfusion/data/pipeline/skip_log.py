"""How much damaged data does a run put up with? What is left out is named and counted; too much of it stops the run."""

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmfusion.data.pipeline.documents import SkippedSample
from lmfusion.utils.json_lines import JsonLines
from lmfusion.utils.printing import escape_line

LEAST_SEEN = 1000
"""Samples that a share is taken of at least, so that one bad sample early on does not end a run."""
NUM_NAMED = 3


class SkipLog:
    """Counts over all ranks, and the file `path`: a line {"step", "sample_id", "reason"} a sample this rank left out.

    Each rank has a log and a file of its own. A sample is also printed to stderr the first time.
    """

    def __init__(self, path: str | Path, max_damaged: float) -> None:
        self.num_vision_tokens = 0
        """Samples drawn so far, by all ranks."""
        self.num_damaged = 0
        """Those of them that were left out."""
        self._lines = JsonLines(Path(path))
        self._max_damaged = max_damaged
        self._printed: set[str] = set()
        self._last: deque[SkippedSample] = deque(maxlen=NUM_NAMED)

    def add(
        self, step: int, num_vision_tokens: int, damaged: Sequence[SkippedSample], num_damaged: int | None = None
    ) -> None:
        """Count one step: `num_vision_tokens` samples of all ranks, `damaged` found by this one, `num_damaged` by all.

        None for num_damaged: this rank is the only one. Raises ValueError, on all ranks in the same step, when more
        than the share `max_damaged` of the samples seen (1,000 at least) was damaged, or all of 1,000 or more.
        """
        self.num_vision_tokens += num_vision_tokens
        self.num_damaged += len(damaged) if num_damaged is None else num_damaged
        for sample_id, reason in damaged:
            self._lines.append({"step": step, "sample_id": sample_id, "reason": reason})
            if sample_id not in self._printed:
                self._printed.add(sample_id)
                print(escape_line(f"left out, damaged: {sample_id}: {reason}"), file=sys.stderr)
        self._last.extend(damaged)
        if self.num_damaged > self._max_damaged * max(self.num_vision_tokens, LEAST_SEEN):
            raise ValueError(
                f"{self.num_damaged} of {self.num_vision_tokens} samples are damaged, more than data.max_damaged, "
                f"{self._max_damaged:g}, allows. The last of them: {self._named()}. Those of earlier steps are in "
                f"{self._lines.path}; mend them, or raise data.max_damaged"
            )
        if self.num_vision_tokens >= LEAST_SEEN:
            self.check_any_good()

    def check_any_good(self) -> None:
        """Raises ValueError where every sample so far was damaged, whatever share is allowed: nothing was learned."""
        if self.num_damaged == self.num_vision_tokens > 0:
            raise ValueError(
                f"all {self.num_vision_tokens} samples read so far are damaged, and nothing was learned. The last of them: "
                f"{self._named()}. `lmfusion data check` tells what is wrong with them"
            )

    def _named(self) -> str:
        last = (escape_line(f"{sample_id}: {reason}") for sample_id, reason in self._last)
        return "; ".join(last) or "found by another rank, or before this start"

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps. The lines so far are on the disk when this returns."""
        self._lines.sync()
        return {"num_vision_tokens": self.num_vision_tokens, "num_damaged": self.num_damaged}

    def resume(self, step: int, state: Mapping[str, int]) -> None:
        """Continue after `step` with its `state`; the file forgets later steps. Without a checkpoint: 0 and {}."""
        self.num_vision_tokens, self.num_damaged = state.get("num_vision_tokens", 0), state.get("num_damaged", 0)
        self._lines.resume(step)

    def close(self) -> None:
        self._lines.close()

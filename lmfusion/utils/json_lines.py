"""How does a log survive a kill? JSON lines, each with its step; resuming drops what lies beyond the checkpoint.

Lines are written before the checkpoint of their step. So a run that resumes from a checkpoint finds every line up to
it, drops the later ones, and writes these again: the same, once.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmfusion.utils.files import name_os_errors, replace_text


class JsonLines:
    """The file `path`, one JSON object a line, each with a whole number `step` that never falls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def resume(self, step: int) -> None:
        """Drop the lines of steps after `step`, and what a kill or a power failure left of one.

        Raises ValueError where a line before these is damaged.
        """
        self.close()
        if not self.path.is_file():
            return
        with name_os_errors(self.path):
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        steps = [_step_of(line) for line in lines]
        num_kept = next((i for i, found in enumerate(steps) if found is None or found > step), len(lines))
        if any(found is not None and found <= step for found in steps[num_kept:]):
            raise ValueError(
                f"{self.path} is damaged at line {num_kept + 1}, before lines of steps up to {step}; restore it, "
                "or delete it"
            )
        replace_text(self.path, "".join(f"{line}\n" for line in lines[:num_kept]))

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line, which a reader sees at once."""
        with name_os_errors(self.path):
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
            self._file.write(json.dumps(dict(values)) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force the lines onto the disk, as is done before a checkpoint that counts on them."""
        if self._file is not None:
            with name_os_errors(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with name_os_errors(self.path):
                file.close()  # it writes what a full disk has not taken yet


def _step_of(line: str) -> int | None:
    """The step of a line; None where it is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None

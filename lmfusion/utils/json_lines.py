"""Logs as JSON lines, each with its step, that survive a kill: resuming drops the lines after the checkpoint.

Lines are written before the checkpoint of their step. So a run that resumes from a checkpoint finds every line up to
it, drops the later ones, and writes them again with the same content: each line is in the log once.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmfusion.utils.files import name_os_errors, replace_text


class JsonLines:
    """The file `path`, one JSON object per line, each with an integer `step` that never decreases."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def resume(self, step: int) -> None:
        """Drop the lines of steps after `step`, and a line that a kill or a power failure left incomplete.

        Raises ValueError where an earlier line is damaged.
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
        """Write one line, which readers can see at once."""
        with name_os_errors(self.path):
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
            self._file.write(json.dumps(dict(values)) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force the lines onto the disk, before a checkpoint that relies on them."""
        if self._file is not None:
            with name_os_errors(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with name_os_errors(self.path):
                file.close()  # it writes again what a full disk has refused before


def _step_of(line: str) -> int | None:
    """The step of a line; None where it is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None

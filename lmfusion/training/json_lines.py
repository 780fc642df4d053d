"""How does a log survive a kill? JSON lines, each with its step; resuming drops what lies beyond the checkpoint.

Lines are written before the checkpoint of their step. So a run that resumes from a checkpoint finds every line up to
it, drops the later ones, and writes these again: the same, once.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmfusion.files import replace_text


class JsonLines:
    """The file `path`, one JSON object a line, each with a whole number `step` that never falls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def resume(self, step: int) -> None:
        """Drop the lines of steps after `step`, and what a kill left of a line."""
        self.close()
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        replace_text(self.path, "".join(kept))

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line, which a reader sees at once."""
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._file.write(json.dumps(dict(values)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force the lines onto the disk, as is done before a checkpoint that counts on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

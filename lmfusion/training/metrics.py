"""What is written down while training? One JSON line in metrics.jsonl each few steps."""

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class StepMetrics:
    """Sums over one step, before its update."""

    loss: float
    lm_loss_sum: float
    num_labels: int
    diffusion_loss_sum: float
    num_images: int
    grad_norm: float
    learning_rate: float
    seconds: float = 0.0
    data_wait_seconds: float = 0.0


@dataclass
class Metrics:
    """One line of metrics.jsonl: what happened since the line before. All but the last two are exactly reproducible."""

    step: int
    """Updates made so far."""
    epoch: float
    """How often the data has been gone through."""
    loss: float
    """Mean over the steps: language-model loss plus weighted diffusion loss."""
    lm_loss: float | None
    """Mean over the labels, in nats. With a frozen text tower only rows after a BOI have labels: captions of
    image-first documents and the ends of caption-first ones. None where there were none."""
    diffusion_loss: float
    """Mean over the images of the squared error, unweighted."""
    grad_norm: float
    """Mean over the steps, before clipping."""
    learning_rate: float
    """Of the last step."""
    images_per_second: float
    data_wait: float
    """Share of the time spent waiting for data."""


class MetricsLog:
    """Gathers steps, and appends a line to a file each `every` of them and at the last."""

    def __init__(self, path: Path, every: int) -> None:
        self._path = path
        self._every = every
        self._gathered: list[StepMetrics] = []
        self._file: Any = None

    def resume(self, step: int, gathered: list[dict[str, Any]]) -> None:
        """Continue after `step` with the steps gathered then; lines of later steps are dropped from the file."""
        self._gathered = [StepMetrics(**values) for values in gathered]
        if not self._path.is_file():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            # A killed run may leave its last line cut short, but then of a later step: checkpoints come after lines
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text("".join(kept), encoding="utf-8")
        os.replace(unfinished, self._path)

    def state(self) -> list[dict[str, Any]]:
        """The steps gathered since the last line, as JSON values."""
        return [dataclasses.asdict(gathered) for gathered in self._gathered]

    def add(self, step: int, epoch: float, metrics: StepMetrics) -> Metrics | None:
        """Take in one step, `step` being the number made so far; answer with the line, if one was due."""
        self._gathered.append(metrics)
        if step % self._every:
            return None
        line = summarise(step, epoch, self._gathered)
        self._gathered = []
        if self._file is None:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._file.write(json.dumps(dataclasses.asdict(line)) + "\n")
        self._file.flush()
        return line

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def summarise(step: int, epoch: float, steps: list[StepMetrics]) -> Metrics:
    """The line that stands for `steps`."""
    num_labels, num_images = sum(s.num_labels for s in steps), sum(s.num_images for s in steps)
    seconds = sum(s.seconds for s in steps)
    return Metrics(
        step=step,
        epoch=epoch,
        loss=sum(s.loss for s in steps) / len(steps),
        lm_loss=sum(s.lm_loss_sum for s in steps) / num_labels if num_labels else None,
        diffusion_loss=sum(s.diffusion_loss_sum for s in steps) / num_images,
        grad_norm=sum(s.grad_norm for s in steps) / len(steps),
        learning_rate=steps[-1].learning_rate,
        images_per_second=num_images / seconds,
        data_wait=sum(s.data_wait_seconds for s in steps) / seconds,
    )


class Stopwatch:
    """Seconds between calls."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

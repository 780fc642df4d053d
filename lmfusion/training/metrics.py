"""What is written down while training? One line of metrics.jsonl each few steps, and what may differ in it.

All of a line but its `TIMINGS` is exact: a run that was killed and resumed writes the same bits on a CPU.
"""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

TIMINGS = ("images_per_second", "tokens_per_second", "mfu", "memory_gb", "data_wait")
"""The keys of a line that depend on the machine and its mood."""


@dataclass(frozen=True)
class StepMetrics:
    """One step over all ranks, before its update."""

    loss: float
    lm_loss_sum: float
    num_labels: int
    boi_loss_sum: float
    num_boi_targets: int
    diffusion_loss_sum: float
    num_images: int
    grad_norm: float
    learning_rate: float
    num_tokens: int
    """Slots that hold a token."""
    num_slots: int
    num_flops: int


@dataclass(frozen=True)
class Metrics:
    """One line of metrics.jsonl: what happened since the line before."""

    step: int
    """Updates made so far."""
    epoch: float
    """How often the data has been gone through so far."""
    loss: float
    """Mean over the steps: language-model loss, begin loss and weighted diffusion loss."""
    lm_loss: float | None
    """Mean over the labels, in nats. With a frozen text tower only rows after a BOI have labels: captions of
    image-first documents and the ends of caption-first ones. None where there were none."""
    boi_loss: float | None
    """Mean over the scored rows before each document's first image, in nats: whether an image begins after them. None
    where there were none, as with a text tower that is trained."""
    diffusion_loss: float | None
    """Mean over the images of the squared error, unweighted. None where there were none."""
    grad_norm: float
    """Mean over the steps, before clipping."""
    learning_rate: float
    """Of the last step."""
    num_samples: int
    """Samples taken from the sources so far, damaged ones included."""
    packing: float
    """Share of the slots that hold a token."""
    num_damaged: int
    """Samples left out so far, see damaged.jsonl."""
    num_cut: int
    """Documents so far that were longer than a row, and cut."""
    images_per_second: float
    tokens_per_second: float
    """Tokens of text and rows of images, over all ranks."""
    mfu: float
    """Model FLOPs utilisation: the share of `train.peak_tflops` that forward and backward passes made use of."""
    memory_gb: float
    """The most that tensors took on the GPU since the line before; on a CPU the most the process ever took. In GB."""
    data_wait: float
    """Share of the time spent waiting for data."""


def summarise(
    steps: Sequence[StepMetrics],
    *,
    step: int,
    epoch: float,
    num_samples: int,
    num_damaged: int,
    num_cut: int,
    seconds: float,
    data_wait: float,
    peak_flops: float,
    memory_gb: float,
) -> Metrics:
    """The line that stands for `steps`, which took `seconds`, `data_wait` of them waiting.

    peak_flops: operations a second of all devices together.
    """
    num_labels, num_images = sum(s.num_labels for s in steps), sum(s.num_images for s in steps)
    num_boi_targets = sum(s.num_boi_targets for s in steps)
    num_tokens = sum(s.num_tokens for s in steps)
    return Metrics(
        step=step,
        epoch=epoch,
        loss=sum(s.loss for s in steps) / len(steps),
        lm_loss=sum(s.lm_loss_sum for s in steps) / num_labels if num_labels else None,
        boi_loss=sum(s.boi_loss_sum for s in steps) / num_boi_targets if num_boi_targets else None,
        diffusion_loss=sum(s.diffusion_loss_sum for s in steps) / num_images if num_images else None,
        grad_norm=sum(s.grad_norm for s in steps) / len(steps),
        learning_rate=steps[-1].learning_rate,
        num_samples=num_samples,
        packing=num_tokens / sum(s.num_slots for s in steps),
        num_damaged=num_damaged,
        num_cut=num_cut,
        images_per_second=num_images / seconds,
        tokens_per_second=num_tokens / seconds,
        mfu=sum(s.num_flops for s in steps) / seconds / peak_flops,
        memory_gb=memory_gb,
        data_wait=data_wait / seconds,
    )


def take_peak_memory(device: torch.device) -> float:
    """GB that tensors took on a GPU at most since this was last asked; of the whole process so far on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Clock:
    """Seconds of training since they were last taken, and those of them spent waiting for data."""

    def __init__(self, seconds: float = 0.0, data_wait: float = 0.0) -> None:
        self._seconds = seconds
        self._data_wait = data_wait
        self._since: float | None = None

    def start(self) -> None:
        """Let time count from here on."""
        self._since = time.perf_counter()

    def so_far(self) -> tuple[float, float]:
        """Seconds, and those spent waiting."""
        if self._since is not None:
            now = time.perf_counter()
            self._seconds, self._since = self._seconds + now - self._since, now
        return self._seconds, self._data_wait

    def take(self) -> tuple[float, float]:
        """As `so_far`, and start again from zero."""
        taken = self.so_far()
        self._seconds = self._data_wait = 0.0
        return taken

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, data is waited for."""
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, something other than training is done, which does not count."""
        self.so_far()
        yield
        self.start()

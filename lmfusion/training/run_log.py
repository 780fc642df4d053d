"""What does a run write down, and where? Lines of metrics and validation, pictures, and a progress bar.

Rank 0 writes; the others keep the same counts and write nothing.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from lmfusion.data.pipeline.loader import Step
from lmfusion.images.grid import save_grid
from lmfusion.model.flops import matmul_rate
from lmfusion.training.config import RunConfig
from lmfusion.training.distributed import World
from lmfusion.training.loggers import Logger, open_loggers
from lmfusion.training.metrics import Clock, StepMetrics, summarise, take_peak_memory
from lmfusion.training.step import Progress
from lmfusion.training.validation import ValidationMetrics
from lmfusion.utils.json_lines import JsonLines


class RunLog:
    """metrics.jsonl, validation.jsonl, samples/, the loggers a run asks for, and what the next line will stand for."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config = config
        self._world = world
        self._is_writer = world.rank == 0
        self._folder = Path(config.output)
        self._metrics = JsonLines(self._folder / "metrics.jsonl")
        self._validation = JsonLines(self._folder / "validation.jsonl")
        self._gathered: list[StepMetrics] = []
        self._loggers: list[Logger] = []
        self._bar: Any = None
        self._peak_flops = 0.0
        self.watch = Clock()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a checkpoint."""
        self._gathered = [StepMetrics(**values) for values in state["gathered"]]
        self.watch = Clock(*state["seconds"])

    def state(self) -> dict[str, Any]:
        """What has been gathered since the last line, as JSON values. The lines so far are forced onto the disk."""
        self._metrics.sync()
        self._validation.sync()
        gathered = [dataclasses.asdict(metrics) for metrics in self._gathered]
        return {"gathered": gathered, "seconds": self.watch.so_far()}

    def open(self, step: int, last: int) -> None:
        """Before the first step of this process: `step` of `last` have been made; lines of later ones are dropped.

        Raises ValueError where the package of a logger is missing.
        """
        train, device = self._config.train, self._world.device
        if train.peak_tflops is None:
            self._peak_flops = matmul_rate(device, getattr(torch, train.dtype)) * self._world.size
        else:
            self._peak_flops = 1e12 * train.peak_tflops * self._world.size
        if self._is_writer:
            self._metrics.resume(step)
            self._validation.resume(step)
            self._loggers = open_loggers(self._config, step)
        interval = 1 if sys.stderr.isatty() else 30
        self._bar = tqdm(total=last, initial=step, unit="step", mininterval=interval, disable=not self._is_writer)
        take_peak_memory(device)
        self.watch.start()

    def close(self) -> None:
        self._metrics.close()
        self._validation.close()
        for logger in self._loggers:
            logger.close()
        if self._bar is not None:
            self._bar.close()

    def gather(self, steps: Sequence[StepMetrics]) -> None:
        """Take in steps that the next line will stand for."""
        self._gathered += steps

    def waiting(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps, the time that each takes to come counted as waiting for data."""
        while True:
            with self.watch.waiting():
                step = next(steps, None)
            if step is None:
                return
            yield step

    def advance(self) -> None:
        """One step more on the progress bar, which tells how long the rest will take."""
        self._bar.update()

    def write_metrics(self, progress: Progress) -> None:
        """Write the line of the steps gathered."""
        seconds, data_wait = self.watch.take()
        line = summarise(
            self._gathered,
            step=progress.step,
            epoch=progress.epoch,
            num_samples=progress.num_samples,
            num_damaged=progress.num_damaged,
            num_cut=progress.num_cut,
            seconds=seconds,
            data_wait=data_wait,
            peak_flops=self._peak_flops,
            memory_gb=take_peak_memory(self._world.device),
        )
        self._gathered = []
        if not self._is_writer:
            return
        values = dataclasses.asdict(line)
        self._metrics.append(values)
        for logger in self._loggers:
            logger.log(line.step, {name: value for name, value in values.items() if name != "step"}, "train")
        self._bar.set_postfix(loss=f"{line.loss:.4f}", images_per_second=f"{line.images_per_second:.0f}")

    def write_validation(self, line: ValidationMetrics) -> None:
        if not self._is_writer:
            return
        values = dataclasses.asdict(line)
        self._validation.append(values)
        losses = values.pop("diffusion_losses")
        values |= {f"diffusion_loss_at_{timestep}": loss for timestep, loss in losses.items()}
        for logger in self._loggers:
            logger.log(line.step, {name: value for name, value in values.items() if name != "step"}, "validation")

    def write_picture(self, step: int, picture: Image.Image) -> None:
        """Save the sample picture of `step`."""
        if not self._is_writer:
            return
        path = self._folder / "samples" / f"step-{step:08d}.png"
        save_grid(picture, path)
        for logger in self._loggers:
            logger.image(step, path)

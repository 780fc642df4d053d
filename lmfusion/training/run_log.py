"""Everything a run writes down: metrics.jsonl, validation.jsonl, sample grids, loggers and the progress bar.

Rank 0 writes. The other ranks keep the same counts and write nothing.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lmfusion.images.grid import save_grid
from lmfusion.model.flops import matmul_rate
from lmfusion.training.config import RunConfig
from lmfusion.training.distributed import World
from lmfusion.training.loggers import Logger, open_loggers
from lmfusion.training.metrics import StepMetrics, summarise, take_peak_memory
from lmfusion.training.step import Progress
from lmfusion.training.step_log import StepLog
from lmfusion.training.validation import ValidationMetrics
from lmfusion.utils.json_lines import JsonLines


class RunLog(StepLog[StepMetrics]):
    """metrics.jsonl, validation.jsonl, samples/ and the loggers that a run asks for."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config = config
        self._world = world
        self._folder = Path(config.output)
        super().__init__(self._folder, StepMetrics, is_writer=world.rank == 0)
        self._validation = JsonLines(self._folder / "validation.jsonl")
        self._loggers: list[Logger] = []
        self._peak_flops = 0.0

    def state(self) -> dict[str, Any]:
        self._validation.sync()
        return super().state()

    def open(self, step: int, last: int) -> None:
        """See `StepLog.open`. Raises ValueError if the package of a logger is missing."""
        train, device = self._config.train, self._world.device
        if train.peak_tflops is None:
            self._peak_flops = matmul_rate(device, getattr(torch, train.dtype)) * self._world.size
        else:
            self._peak_flops = 1e12 * train.peak_tflops * self._world.size
        if self._is_writer:
            self._validation.resume(step)
            self._loggers = open_loggers(self._config, step)
        take_peak_memory(device)
        super().open(step, last)

    def close(self) -> None:
        super().close()
        self._validation.close()
        for logger in self._loggers:
            logger.close()

    def write_metrics(self, progress: Progress) -> None:
        """Write the line of the steps gathered since the last one."""
        steps, seconds, data_wait = self.take()
        line = summarise(
            steps,
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
        self.write(line, loss=f"{line.loss:.4f}", images_per_second=f"{line.images_per_second:.0f}")
        self._log(line.step, dataclasses.asdict(line), "train")

    def write_validation(self, line: ValidationMetrics) -> None:
        if not self._is_writer:
            return
        values = dataclasses.asdict(line)
        self._validation.append(values)
        losses = values.pop("diffusion_losses")
        values |= {f"diffusion_loss_at_{timestep}": loss for timestep, loss in losses.items()}
        self._log(line.step, values, "validation")

    def _log(self, step: int, values: Mapping[str, Any], section: str) -> None:
        for logger in self._loggers:
            logger.log(step, {name: value for name, value in values.items() if name != "step"}, section)

    def write_samples(self, step: int, grid: Image.Image) -> None:
        """Save the sample grid of `step`."""
        if not self._is_writer:
            return
        path = self._folder / "samples" / f"step-{step:08d}.png"
        save_grid(grid, path)
        for logger in self._loggers:
            logger.image(step, path)

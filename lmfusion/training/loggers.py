"""TensorBoard and Weights & Biases, for runs that ask for them.

Each package is imported only then. metrics.jsonl is the record; after a kill these loggers may show steps twice.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lmfusion.training.config import RunConfig


class Logger(Protocol):
    """Takes numbers and images of steps, in ascending order."""

    def log(self, step: int, values: Mapping[str, float | None], section: str) -> None:
        """Log numbers of one step as "<section>/<name>"; None values are left out."""

    def image(self, step: int, path: Path) -> None:
        """Log the sample grid of one step."""

    def close(self) -> None: ...


def open_loggers(config: RunConfig, step: int) -> list[Logger]:
    """The loggers that `train.tensorboard` and `train.wandb` ask for, continuing after `step`.

    Raises ValueError if the package of one is not installed.
    """
    loggers: list[Logger] = []
    if config.train.tensorboard:
        loggers.append(TensorBoard(Path(config.output), step))
    if config.train.wandb is not None:
        loggers.append(WeightsAndBiases(config, step))
    return loggers


class TensorBoard:
    """Event files in <output>/tensorboard, for `tensorboard --logdir <output>`."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "train.tensorboard needs TensorBoard, which is not installed; pip install tensorboard"
            ) from None
        # Hides the points of steps that a kill undid
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float | None], section: str) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{section}/{name}", value, step)
        self._writer.flush()

    def image(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self._writer.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `train.wandb`; the same one whenever the run in this folder continues."""

    def __init__(self, config: RunConfig, step: int) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("train.wandb needs Weights & Biases, which is not installed; pip install wandb") from None
        from lmfusion.utils.config_values import to_values

        self._wandb = wandb
        folder = Path(config.output).resolve()
        started = f"{folder}:{os.stat(folder).st_ino}"  # a folder that was deleted and made again is another run
        self._run: Any = wandb.init(
            project=config.train.wandb,
            name=folder.name,
            id=hashlib.sha256(started.encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=to_values(config),
        )

    def log(self, step: int, values: Mapping[str, float | None], section: str) -> None:
        given = {f"{section}/{name}": value for name, value in values.items() if value is not None}
        self._run.log(given, step=step)

    def image(self, step: int, path: Path) -> None:
        self._run.log({"samples": self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()

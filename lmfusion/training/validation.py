"""How well does the model do on what it is not trained on? The same samples, noise and timesteps every time.

Each sample is read in both orders: caption first at eight fixed timesteps, which gives the diffusion loss and the loss
of the caption before the image (which can give a frozen text tower no gradient, so training leaves it out); and image
first, its image clean, which gives the loss of the caption read off the image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lmfusion.data.config import DataConfig
from lmfusion.data.pipeline.loader import LoaderState, PackedLoader
from lmfusion.data.pipeline.skip_log import MIN_COUNTED
from lmfusion.model.batch import Batch
from lmfusion.model.modeling import LMFusion
from lmfusion.training.config import RunConfig
from lmfusion.training.distributed import World

NUM_TIMESTEPS = 8


@dataclass(frozen=True)
class ValidationMetrics:
    """One line of validation.jsonl. Means over images and labels; None where there were none."""

    step: int
    lm_loss: float | None
    """Of captions after their images, and of the text of interleaved documents, images clean. In nats a token."""
    caption_first_lm_loss: float | None
    """Of captions before their images. In nats a token."""
    diffusion_loss: float | None
    """Mean of `diffusion_losses`."""
    diffusion_losses: dict[str, float | None]
    """Unweighted squared error by timestep."""
    num_samples: int
    num_damaged: int
    """Samples that were left out."""


class Validation:
    """The samples of `config.validation`, read once and kept in memory. What it computes does not depend on the ranks.

    make_loader: builds the loader of a `DataConfig` for this process alone, for a text tower that is not frozen, so
    that all text has labels. Raises ValueError where too many samples are damaged.
    """

    def __init__(self, config: RunConfig, world: World, make_loader: Callable[[DataConfig], PackedLoader]) -> None:
        self._world = world
        data = replace(config.data, sources=config.validation.sources, caption_drop=0.0, sample_latents=False)
        data = replace(data, cache_megabytes=0)  # the rows themselves are kept
        caption_first, image_first = replace(data, image_first=0.0), replace(data, image_first=1.0)
        num_samples = config.validation.num_samples
        if world.rank == 0:
            make_loader(data).report_unused()
        self._caption_first = _Rows(caption_first, num_samples, make_loader, world)
        self._image_first = _Rows(image_first, num_samples, make_loader, world)

    @torch.no_grad()
    def evaluate(self, model: LMFusion, step: int) -> ValidationMetrics:
        """Losses of `model` as it is, in evaluation mode. All ranks call it and get the same."""
        num_train_timesteps = model.diffusion.config.num_train_timesteps
        timesteps = [int((i + 0.5) / NUM_TIMESTEPS * num_train_timesteps) for i in range(NUM_TIMESTEPS)]
        noisy = self._sums(model, self._caption_first, timesteps)
        (clean,) = self._sums(model, self._image_first, [0])
        num_images = self._caption_first.num_images
        losses = [_mean(diffusion_loss_sum, num_images) for _, diffusion_loss_sum in noisy]
        return ValidationMetrics(
            step=step,
            lm_loss=_mean(clean[0], self._image_first.num_labels),
            caption_first_lm_loss=_mean(sum(lm for lm, _ in noisy) / len(noisy), self._caption_first.num_labels),
            diffusion_loss=None if None in losses else sum(losses) / len(losses),  # type: ignore[arg-type]
            diffusion_losses={str(t): loss for t, loss in zip(timesteps, losses, strict=True)},
            num_samples=self._caption_first.num_samples,
            num_damaged=len(self._caption_first.damaged),
        )

    def _sums(self, model: LMFusion, rows: "_Rows", timesteps: Sequence[int]) -> list[list[float]]:
        """Losses of language and diffusion at each of `timesteps`, summed over all rows."""
        sums = torch.zeros(rows.num_rows, len(timesteps), 2, dtype=torch.float64, device=self._world.device)
        for number, batch in rows.mine:
            moved = batch.to(self._world.device)
            for i, timestep in enumerate(timesteps):
                at = torch.zeros_like(moved.timesteps).index_fill(0, moved.drawn, timestep)
                output = model(batch=replace(moved, timesteps=at))
                if number < rows.num_rows:
                    sums[number, i] = torch.stack([output.lm_loss_sum, output.diffusion_loss_sum])
        # Every row has a place of its own, to which the other ranks add zeros: no rounding depends on who computed it
        return self._world.sum_tensor(sums).sum(0).tolist()


class _Rows:
    """Rows of the first `num_samples` samples, or of all there are; those that this rank computes in memory."""

    def __init__(
        self, config: DataConfig, num_samples: int, make_loader: Callable[[DataConfig], PackedLoader], world: World
    ) -> None:
        rows: list[Batch] = []
        self.damaged: list[Any] = []
        self.num_samples = 0
        # One window of so many samples, of which every rank sees all rows
        loader = make_loader(replace(config, pack_window=num_samples))
        if loader.num_samples < num_samples:
            num_samples = loader.num_samples
            loader = make_loader(replace(config, pack_window=num_samples))
        for step in loader.steps(LoaderState(), 2**62):
            (row,) = step.batches
            rows.append(row)
            self.num_samples += step.num_samples
            self.damaged += step.damaged
            if self.num_samples >= num_samples:
                break
        self.num_rows = len(rows)
        self.num_labels = sum(row.num_labels for row in rows)
        self.num_images = sum(row.num_target_images for row in rows)
        self._check_damage(config)
        self._check_same(world)
        # All ranks compute equally often, since they gather weights together; what is beyond the last row is left out
        turns = range(world.rank, -(-len(rows) // world.size) * world.size, world.size)
        self.mine = [(number, rows[min(number, len(rows) - 1)]) for number in turns]

    def _check_damage(self, config: DataConfig) -> None:
        num_damaged = len(self.damaged)
        if num_damaged > config.max_damaged * max(self.num_samples, MIN_COUNTED) or num_damaged == self.num_samples:
            first = self.damaged[0]
            raise ValueError(
                f"{num_damaged} of {self.num_samples} samples of validation.sources are damaged, {first.sample_id} "
                f"for one: {first.reason}. Mend them, or raise data.max_damaged from {config.max_damaged}"
            )

    def _check_same(self, world: World) -> None:
        """What one rank alone could not read would shift the rows of all."""
        mine = [self.num_rows, self.num_labels, self.num_images, len(self.damaged)]
        if world.sum_integers(mine) != [world.size * count for count in mine]:
            raise ValueError(
                f"the ranks read different samples of validation.sources: this one has {self.num_images} images, and "
                f"{len(self.damaged)} samples are damaged. Is the storage the same for all {world.size} ranks, and "
                "does it answer?"
            )


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None

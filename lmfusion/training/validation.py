"""Losses on held-out samples, with the same samples, noise and timesteps every time.

Each sample is used in both orders. Caption first, at eight fixed timesteps, gives the diffusion loss and the loss of
the caption before the image (which training leaves out with a frozen text tower, since it can give no gradient). Image
first, without noise, gives the loss of the caption that describes the image.
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
    """One line of validation.jsonl. Means over images and labels; None if there were none."""

    step: int
    lm_loss: float | None
    """Of captions after their images, and of the text of interleaved documents, images without noise. Nats/token."""
    caption_first_lm_loss: float | None
    """Of captions before their images. Nats per token."""
    diffusion_loss: float | None
    """Mean of `diffusion_losses`."""
    diffusion_losses: dict[str, float | None]
    """Unweighted squared error by timestep."""
    num_samples: int
    num_damaged: int
    """Samples that were skipped."""


class Validation:
    """The samples of `config.validation`, read once and kept in memory. Losses do not depend on the number of ranks.

    make_loader: builds the loader of a `DataConfig` for this process alone, with a text tower that is not frozen, so
    that all text has labels. Raises ValueError if too many samples are damaged.
    """

    def __init__(self, config: RunConfig, world: World, make_loader: Callable[[DataConfig], PackedLoader]) -> None:
        self._world = world
        data = replace(config.data, sources=config.validation.sources, caption_drop=0.0, sample_latents=False)
        data = replace(data, cache_megabytes=0)  # the packed sequences themselves are kept
        caption_first, image_first = replace(data, image_first=0.0), replace(data, image_first=1.0)
        num_samples = config.validation.num_samples
        if world.rank == 0:
            make_loader(data).report_unused()
        self._caption_first = _HeldOut(caption_first, num_samples, make_loader, world)
        self._image_first = _HeldOut(image_first, num_samples, make_loader, world)

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

    def _sums(self, model: LMFusion, held_out: "_HeldOut", timesteps: Sequence[int]) -> list[list[float]]:
        """Language and diffusion losses at each of `timesteps`, summed over all packed sequences."""
        sums = torch.zeros(held_out.num_sequences, len(timesteps), 2, dtype=torch.float64, device=self._world.device)
        for number, batch in held_out.mine:
            moved = batch.to(self._world.device)
            for i, timestep in enumerate(timesteps):
                at = torch.zeros_like(moved.timesteps).index_fill(0, moved.target_image_indices, timestep)
                output = model(batch=replace(moved, timesteps=at))
                if number < held_out.num_sequences:
                    sums[number, i] = torch.stack([output.lm_loss_sum, output.diffusion_loss_sum])
        # Each sequence has its own place, to which the other ranks add zeros, so rounding does not depend on the ranks
        return self._world.sum_tensor(sums).sum(0).tolist()


class _HeldOut:
    """The first `num_samples` samples (or all, if fewer), packed. Keeps the sequences that this rank computes."""

    def __init__(
        self, config: DataConfig, num_samples: int, make_loader: Callable[[DataConfig], PackedLoader], world: World
    ) -> None:
        batches: list[Batch] = []
        self.damaged: list[Any] = []
        self.num_samples = 0
        # One packing window with all samples, of which every rank reads all sequences
        loader = make_loader(replace(config, pack_window=num_samples))
        if loader.num_samples < num_samples:
            num_samples = loader.num_samples
            loader = make_loader(replace(config, pack_window=num_samples))
        for step in loader.steps(LoaderState(), 2**62):
            (batch,) = step.batches
            batches.append(batch)
            self.num_samples += step.num_samples
            self.damaged += step.damaged
            if self.num_samples >= num_samples:
                break
        self.num_sequences = len(batches)
        self.num_labels = sum(batch.num_labels for batch in batches)
        self.num_images = sum(batch.num_target_images for batch in batches)
        self._check_damage(config)
        self._check_same(world)
        # All ranks must run the same number of forwards, because they gather weights together. Surplus ranks repeat the
        # last sequence, whose result is dropped.
        numbers = range(world.rank, -(-len(batches) // world.size) * world.size, world.size)
        self.mine = [(number, batches[min(number, len(batches) - 1)]) for number in numbers]

    def _check_damage(self, config: DataConfig) -> None:
        num_damaged = len(self.damaged)
        if num_damaged > config.max_damaged * max(self.num_samples, MIN_COUNTED) or num_damaged == self.num_samples:
            first = self.damaged[0]
            raise ValueError(
                f"at most a share of {config.max_damaged:g} of validation.sources may be damaged, got {num_damaged} of "
                f"{self.num_samples} samples, such as {first.sample_id}: {first.reason}. Repair them, or raise "
                "data.max_damaged"
            )

    def _check_same(self, world: World) -> None:
        """A sample that only one rank cannot read would shift its packed sequences."""
        mine = [self.num_sequences, self.num_labels, self.num_images, len(self.damaged)]
        if world.sum_integers(mine) != [world.size * count for count in mine]:
            raise ValueError(
                f"all {world.size} ranks must read the same samples of validation.sources, "
                f"got {self.num_images} images and {len(self.damaged)} damaged samples on this rank. Check that the "
                "storage is the same for all ranks and reachable"
            )


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None

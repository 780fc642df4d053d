"""One training step: the gradients of its micro-batches and one update, without waiting for the device.

A micro-batch is one packed sequence. Only `fetch_metrics` waits for the device, and 8-bit AdamW, which cannot skip an
update there. Until then nobody on the host knows whether a loss or gradient is finite, so a step that is not finite
sets a flag on the device, and from that step on the optimizer and the average change nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lmfusion.data.pipeline.loader import LoaderState, Step
from lmfusion.model.batch import Batch
from lmfusion.model.modeling import LMFusion
from lmfusion.training.distributed import World
from lmfusion.training.ema import EMA
from lmfusion.training.metrics import StepMetrics
from lmfusion.training.optimizer import Optimizer, clip_gradients, learning_rate

Loss = TypeVar("Loss", float, Tensor)


class CollectiveError(ValueError):
    """A reason why a run cannot go on. All ranks raise it at the same step, so that they can still save together."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come: what is needed besides tensors to continue from there."""

    step: int = 0
    """Updates made so far."""
    loader: LoaderState = LoaderState()  # noqa: RUF009 (it is frozen)
    epoch: float = 0.0
    num_samples: int = 0
    num_damaged: int = 0
    num_cut: int = 0


class NonFiniteError(CollectiveError):
    """A loss or gradient that is infinite or not a number; neither its update nor any later one was made."""


class Totals(NamedTuple):
    """Counts of one step over all ranks, known on the host before its first forward."""

    num_labels: int
    num_boi_targets: int
    num_images: int
    """Target images, over which the diffusion loss is a mean."""
    num_flops: int
    num_damaged: int


class Update(NamedTuple):
    """A step that is queued on the device, or done."""

    before: Progress
    totals: Totals
    num_tokens: int
    batch_tokens: int
    learning_rate: float
    sums: Tensor
    """float64 [4]: language, BOI and diffusion loss, each summed over all ranks, and the norm of the gradient"""
    micro_batch_sums: Tensor
    """float64 [number of micro-batches, 3]: the three loss sums of each micro-batch of this rank"""
    sample_ids: tuple[tuple[str, ...], ...]
    """Of each micro-batch of this rank."""


def agreed_steps(
    steps: Iterator[Step], world: World, num_flops: Callable[[Batch], int]
) -> Iterator[tuple[Step, Totals]]:
    """Each step of this rank, with its totals over all ranks.

    If one rank cannot read its data, all raise CollectiveError; the error of that rank gives the reason.
    """
    while True:
        step, error = None, None
        try:
            step = next(steps, None)
        except (ValueError, OSError) as caught:
            error = caught
        counts = Totals(0, 0, 0, 0, 0)
        if step is not None:
            counts = Totals(
                num_labels=sum(batch.num_labels for batch in step.batches),
                num_boi_targets=sum(batch.num_boi_targets for batch in step.batches),
                num_images=sum(batch.num_target_images for batch in step.batches),
                num_flops=sum(num_flops(batch) for batch in step.batches),
                num_damaged=len(step.damaged),
            )
        # All ranks must agree on these. A text that only one rank cannot read would shift all documents after it, and
        # the ranks would then train on different batches without noticing.
        shared = (step.num_samples, step.num_tokens_used) if step is not None else (0, 0)
        *sums, num_failed, num_samples, num_tokens = world.sum_integers([*counts, int(error is not None), *shared])
        if error is not None:
            raise CollectiveError(str(error)) from error
        if num_failed:
            raise CollectiveError("another rank cannot read its data; its message gives the reason")
        if (num_samples, num_tokens) != (world.size * shared[0], world.size * shared[1]):
            raise CollectiveError(
                f"all {world.size} ranks must read the same texts, got {shared[0]} of {num_samples} samples and "
                f"{shared[1]} of {num_tokens} tokens on this rank. Check that the storage is the same for all ranks "
                "and reachable; then the same command continues from here"
            )
        if step is None:
            return
        yield step, Totals(*sums)


class Updater:
    """Computes gradients and makes the updates of a run."""

    def __init__(
        self, model: LMFusion, weights: Mapping[str, nn.Parameter], optimizer: Optimizer, ema: EMA, world: World
    ) -> None:
        self._model = model
        self._weights = weights
        self._optimizer = optimizer
        self._ema = ema
        self._world = world
        self._skip = torch.zeros((), device=world.device)
        """0, or 1 from the first step that is not finite; GradScaler calls it found_inf."""

    def update(self, before: Progress, step: Step, totals: Totals, batch_tokens: int) -> Update:
        """Queue one step on the device: forward and backward of each micro-batch, then the update."""
        micro_batch_sums = torch.stack([self._backward(batch, totals) for batch in step.batches])
        norm = clip_gradients(self._weights.values(), self._optimizer.config.max_grad_norm, self._world)
        sums = torch.cat([self._world.sum_tensor(micro_batch_sums.sum(0)), norm.double()[None]])
        self._skip = torch.maximum(self._skip, 1.0 - sums.isfinite().all().float())
        if self._optimizer.can_skip:
            self._optimizer.step(before.step, self._skip)
        elif not self._skip.item():
            self._optimizer.step(before.step)
        self._ema.update(before.step, self._skip)
        rate = learning_rate(before.step, self._optimizer.config)
        sample_ids = tuple(batch.sample_ids for batch in step.batches)
        return Update(before, totals, step.num_tokens_used, batch_tokens, rate, sums, micro_batch_sums, sample_ids)

    def _backward(self, batch: Batch, totals: Totals) -> Tensor:
        """Add the gradient of one micro-batch's share of the loss; returns its three loss sums, float64 [3]."""
        output = self._model(batch=batch.to(self._world.device))
        sums = (output.lm_loss_sum, output.boi_loss_sum, output.diffusion_loss_sum)
        # FSDP averages gradients over the ranks, but the loss is already a mean over the labels and images of all
        # ranks, so it must be multiplied by their number.
        loss = step_loss(sums, totals, self._model) * self._world.size
        loss.backward()
        return torch.stack([total.detach().double() for total in sums])


def step_loss(sums: Sequence[Loss], totals: Totals, model: LMFusion) -> Loss:
    """The training loss: the means over labels and over BOI targets, plus the weighted mean over the target images.

    sums: language, BOI and diffusion loss.
    """
    lm_loss_sum, boi_loss_sum, diffusion_loss_sum = sums
    weight = model.config.diffusion.loss_weight
    loss = lm_loss_sum / max(1, totals.num_labels) + boi_loss_sum / max(1, totals.num_boi_targets)
    return loss + weight * diffusion_loss_sum / max(1, totals.num_images)


def fetch_metrics(updates: Sequence[Update], model: LMFusion) -> tuple[list[StepMetrics], NonFiniteError | None]:
    """Wait for the device and read the metrics of `updates`, up to the first that is not finite, and its error."""
    if not updates:
        return [], None
    # One copy for all steps, since each copy from the device waits
    tensors = [x.flatten() for update in updates for x in (update.sums, update.micro_batch_sums)]
    numbers = iter(torch.cat(tensors).tolist())
    steps: list[StepMetrics] = []
    for update in updates:
        *sums, grad_norm = (next(numbers) for _ in range(4))
        micro_batch_sums = [sum(next(numbers) for _ in range(3)) for _ in update.sample_ids]
        if not all(map(math.isfinite, (*sums, grad_norm))):
            is_loss = not math.isfinite(sum(sums))
            return steps, _non_finite(update, "loss" if is_loss else "gradient", micro_batch_sums)
        lm_loss_sum, boi_loss_sum, diffusion_loss_sum = sums
        steps.append(
            StepMetrics(
                loss=step_loss(sums, update.totals, model),
                lm_loss_sum=lm_loss_sum,
                num_labels=update.totals.num_labels,
                boi_loss_sum=boi_loss_sum,
                num_boi_targets=update.totals.num_boi_targets,
                diffusion_loss_sum=diffusion_loss_sum,
                num_images=update.totals.num_images,
                grad_norm=grad_norm,
                learning_rate=update.learning_rate,
                num_tokens=update.num_tokens,
                batch_tokens=update.batch_tokens,
                num_flops=update.totals.num_flops,
            )
        )
    return steps, None


def _non_finite(update: Update, what: str, micro_batch_sums: Sequence[float]) -> NonFiniteError:
    suspects = [ids for ids, total in zip(update.sample_ids, micro_batch_sums, strict=True) if not math.isfinite(total)]
    if what == "loss" and not suspects:
        where = "look at the samples that another rank names in its message"
    else:
        sample_ids = [sample_id for ids in suspects or update.sample_ids for sample_id in ids]
        where = f"look at the samples: {', '.join(sample_ids)}"
    return NonFiniteError(
        f"step {update.before.step + 1}: the {what} is not finite; no update was made. "
        f"Lower train.learning_rate, or {where}"
    )

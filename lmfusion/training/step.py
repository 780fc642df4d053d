"""What is one step? The gradients of all its rows, one update, and numbers that stay on the device until they are read.

Nothing here waits for the device but `read`. So that a loss or gradient that is not finite does no harm until then, its
step sets a flag on the device, and from there on the optimizer and the average leave everything as it is.
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
    """Why a run cannot go on. All ranks raise it at the same step, so that they can still save together."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come: what has to be known besides tensors to go on from there."""

    step: int = 0
    """Updates made so far."""
    loader: LoaderState = LoaderState()  # noqa: RUF009 (it is frozen)
    epoch: float = 0.0
    num_samples: int = 0
    num_damaged: int = 0
    num_cut: int = 0


class NonFiniteError(CollectiveError):
    """A loss or gradient that is infinite or not a number; neither its update nor any after it was made."""


class Totals(NamedTuple):
    """Counts of one step over all ranks, known on the host before its first forward."""

    num_labels: int
    num_boi_targets: int
    num_images: int
    """Those that are drawn: what the diffusion's loss is a mean over."""
    num_flops: int
    num_damaged: int


class Update(NamedTuple):
    """A step that was made, or will have been once the device gets there."""

    before: Progress
    totals: Totals
    num_tokens: int
    num_slots: int
    learning_rate: float
    sums: Tensor
    """float64 [4]: losses of language, begin and diffusion, summed over all ranks, and the norm of the gradient"""
    row_sums: Tensor
    """float64 [number of rows, 3]: the three losses of each row of this rank"""
    sample_ids: tuple[tuple[str, ...], ...]
    """Of each row of this rank."""


def agreed_steps(
    steps: Iterator[Step], world: World, num_flops: Callable[[Batch], int]
) -> Iterator[tuple[Step, Totals]]:
    """Each step of this rank, and what it comes to over all ranks.

    Where one rank cannot get its rows, all raise CollectiveError, that rank with the reason.
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
                num_labels=sum(row.num_labels for row in step.batches),
                num_boi_targets=sum(row.num_boi_targets for row in step.batches),
                num_images=sum(row.num_target_images for row in step.batches),
                num_flops=sum(num_flops(row) for row in step.batches),
                num_damaged=len(step.damaged),
            )
        # What all ranks must agree on: a text that one of them alone could not read would shift its rows
        shared = (step.num_samples, step.num_tokens_used) if step is not None else (0, 0)
        *sums, num_failed, num_samples, num_slots = world.sum_integers([*counts, int(error is not None), *shared])
        if error is not None:
            raise CollectiveError(str(error)) from error
        if num_failed:
            raise CollectiveError("another rank cannot read its data; its message says why")
        if (num_samples, num_slots) != (world.size * shared[0], world.size * shared[1]):
            raise CollectiveError(
                f"the ranks read different texts: of {num_samples} samples this one has {shared[0]}, of {num_slots} "
                f"slots {shared[1]}. Is the storage the same for all {world.size} ranks, and does it answer? The same "
                "command goes on from here"
            )
        if step is None:
            return
        yield step, Totals(*sums)


class Updater:
    """Makes the updates of a run."""

    def __init__(
        self, model: LMFusion, weights: Mapping[str, nn.Parameter], optimizer: Optimizer, ema: EMA, world: World
    ) -> None:
        self._model = model
        self._weights = weights
        self._optimizer = optimizer
        self._ema = ema
        self._world = world
        self._skip = torch.zeros((), device=world.device)
        """1 from the first step on that is not finite, else 0: what GradScaler calls found_inf."""

    def update(self, before: Progress, step: Step, totals: Totals, num_slots: int) -> Update:
        """Queue one step on the device: forward and backward of each row, then the update."""
        row_sums = torch.stack([self._backward(row, totals) for row in step.batches])
        norm = clip_gradients(self._weights.values(), self._optimizer.config.max_grad_norm, self._world)
        sums = torch.cat([self._world.sum_tensor(row_sums.sum(0)), norm.double()[None]])
        self._skip = torch.maximum(self._skip, 1.0 - sums.isfinite().all().float())
        if self._optimizer.can_skip:
            self._optimizer.step(before.step, self._skip)
        elif not self._skip.item():
            self._optimizer.step(before.step)
        self._ema.update(before.step, self._skip)
        rate = learning_rate(before.step, self._optimizer.config)
        sample_ids = tuple(row.sample_ids for row in step.batches)
        return Update(before, totals, step.num_tokens_used, num_slots, rate, sums, row_sums, sample_ids)

    def _backward(self, row: Batch, totals: Totals) -> Tensor:
        """Add the gradient of one row's part of the loss; answer with the row's three sums, float64 [3]."""
        output = self._model(batch=row.to(self._world.device))
        sums = (output.lm_loss_sum, output.begin_loss_sum, output.diffusion_loss_sum)
        # Gradients are averaged over the ranks, but the loss is a mean over the labels and images of all of them
        loss = step_loss(sums, totals, self._model) * self._world.size
        loss.backward()
        return torch.stack([total.detach().double() for total in sums])


def step_loss(sums: Sequence[Loss], totals: Totals, model: LMFusion) -> Loss:
    """What is minimised: the means over labels and over decisions, plus the weighted mean over the images.

    sums: losses of language, begin and diffusion.
    """
    lm_loss_sum, begin_loss_sum, diffusion_loss_sum = sums
    weight = model.config.diffusion.loss_weight
    loss = lm_loss_sum / max(1, totals.num_labels) + begin_loss_sum / max(1, totals.num_boi_targets)
    return loss + weight * diffusion_loss_sum / max(1, totals.num_images)


def read(updates: Sequence[Update], model: LMFusion) -> tuple[list[StepMetrics], NonFiniteError | None]:
    """Wait for the device, and read what `updates` gave, up to the first that is not finite, and the error for that."""
    if not updates:
        return [], None
    numbers = iter(torch.cat([x.flatten() for update in updates for x in (update.sums, update.row_sums)]).tolist())
    steps: list[StepMetrics] = []
    for update in updates:
        *sums, grad_norm = (next(numbers) for _ in range(4))
        row_sums = [sum(next(numbers) for _ in range(3)) for _ in update.sample_ids]
        if not all(map(math.isfinite, (*sums, grad_norm))):
            is_loss = not math.isfinite(sum(sums))
            return steps, _non_finite(update, "loss" if is_loss else "gradient", row_sums)
        lm_loss_sum, begin_loss_sum, diffusion_loss_sum = sums
        steps.append(
            StepMetrics(
                loss=step_loss(sums, update.totals, model),
                lm_loss_sum=lm_loss_sum,
                num_labels=update.totals.num_labels,
                begin_loss_sum=begin_loss_sum,
                num_boi_targets=update.totals.num_boi_targets,
                diffusion_loss_sum=diffusion_loss_sum,
                num_images=update.totals.num_images,
                grad_norm=grad_norm,
                learning_rate=update.learning_rate,
                num_tokens=update.num_tokens,
                num_slots=update.num_slots,
                num_flops=update.totals.num_flops,
            )
        )
    return steps, None


def _non_finite(update: Update, what: str, row_sums: Sequence[float]) -> NonFiniteError:
    rows = [ids for ids, total in zip(update.sample_ids, row_sums, strict=True) if not math.isfinite(total)]
    if what == "loss" and not rows:
        where = "the samples are another rank's, whose message names them"
    else:
        where = f"look at the samples: {', '.join(sample_id for ids in rows or update.sample_ids for sample_id in ids)}"
    return NonFiniteError(
        f"step {update.before.step + 1}: the {what} is not finite; no update was made. "
        f"Lower train.learning_rate, or {where}"
    )

"""The metrics of a training step, and the line of metrics.jsonl that summarises a few of them.

Everything in a line except its `TIMINGS` is exact: on a CPU, a run that was killed and resumed writes the same bits.
"""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

TIMINGS = ("images_per_second", "tokens_per_second", "mfu", "memory_gb", "data_wait")
"""Keys of a line that vary between identical runs."""


@dataclass(frozen=True)
class StepMetrics:
    """Sums and counts of one step over all ranks, before its update."""

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
    """Of text and images, without padding."""
    batch_tokens: int
    """With padding."""
    num_flops: int


@dataclass(frozen=True)
class TrainMetrics:
    """One line of metrics.jsonl: what happened since the previous line."""

    step: int
    """Updates made so far."""
    epoch: float
    """Passes over the data so far."""
    loss: float
    """Mean over the steps of language-model loss + BOI loss + weighted diffusion loss."""
    lm_loss: float | None
    """Mean over the labels, in nats. With a frozen text tower only tokens after a BOI have labels: captions of
    image-first documents and the ends of caption-first ones. None if there were no labels."""
    boi_loss: float | None
    """Mean, in nats, over the scored tokens before each document's first image: does an image begin after this token?
    None if there were none, as with a trained text tower."""
    diffusion_loss: float | None
    """Mean squared error over the target images, unweighted. None if there were none."""
    grad_norm: float
    """Mean over the steps, before clipping."""
    learning_rate: float
    """Of the last step."""
    num_samples: int
    """Samples read from the sources so far, including skipped ones."""
    packing: float
    """Share of the tokens that are not padding."""
    num_damaged: int
    """Samples skipped so far, see damaged.jsonl."""
    num_cut: int
    """Documents so far that were longer than data.seq_len, and cut."""
    images_per_second: float
    tokens_per_second: float
    """Tokens of text and images, over all ranks."""
    mfu: float
    """Model FLOPs utilisation: the share of `train.peak_tflops` that forward and backward passes used."""
    memory_gb: float
    """Peak memory of tensors on the GPU since the previous line; on a CPU the peak of the process so far. In GB."""
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
) -> TrainMetrics:
    """The line that summarises `steps`, which took `seconds`, `data_wait` of them waiting for data.

    peak_flops: operations per second of all devices together.
    """
    num_labels, num_images = sum(s.num_labels for s in steps), sum(s.num_images for s in steps)
    num_boi_targets = sum(s.num_boi_targets for s in steps)
    num_tokens = sum(s.num_tokens for s in steps)
    return TrainMetrics(
        step=step,
        epoch=epoch,
        loss=sum(s.loss for s in steps) / len(steps),
        lm_loss=sum(s.lm_loss_sum for s in steps) / num_labels if num_labels else None,
        boi_loss=sum(s.boi_loss_sum for s in steps) / num_boi_targets if num_boi_targets else None,
        diffusion_loss=sum(s.diffusion_loss_sum for s in steps) / num_images if num_images else None,
        grad_norm=sum(s.grad_norm for s in steps) / len(steps),
        learning_rate=steps[-1].learning_rate,
        num_samples=num_samples,
        packing=num_tokens / sum(s.batch_tokens for s in steps),
        num_damaged=num_damaged,
        num_cut=num_cut,
        images_per_second=num_images / seconds,
        tokens_per_second=num_tokens / seconds,
        mfu=sum(s.num_flops for s in steps) / seconds / peak_flops,
        memory_gb=memory_gb,
        data_wait=data_wait / seconds,
    )


def take_peak_memory(device: torch.device) -> float:
    """Peak memory in GB of tensors on a GPU since the last call; on a CPU, of the whole process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

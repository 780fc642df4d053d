"""What is written down while an autoencoder trains? One JSON line in metrics.jsonl each few steps."""

from dataclasses import dataclass

OPTIONAL_TERMS = ("lpips", "gan", "gan_weight", "discriminator_loss", "discriminator_grad_norm")
"""None where they are not at work."""


@dataclass(frozen=True)
class StepMetrics:
    """One step, before its update."""

    num_images: int
    loss: float
    l1: float
    kl: float
    lpips: float | None
    gan: float | None
    gan_weight: float | None
    discriminator_loss: float | None
    discriminator_grad_norm: float | None
    grad_norm: float
    learning_rate: float
    num_damaged: int
    psnr: float | None = None


@dataclass(frozen=True)
class Metrics:
    """One line: what happened since the line before. All but the last two are exact on a CPU."""

    step: int
    """Updates made so far."""
    epoch: float
    """How often the data has been gone through."""
    loss: float
    """Of the autoencoder: all terms at their weights, mean over the images, as are the terms by themselves."""
    l1: float
    """Of a pixel value; images span [-1, 1]."""
    kl: float
    """Nats per latent value."""
    lpips: float | None
    gan: float | None
    """Minus the score of reconstructions: below 0 where they pass for images."""
    gan_weight: float | None
    """Adaptive; loss.gan_weight multiplies it."""
    discriminator_loss: float | None
    """1 where the discriminator cannot tell reconstructions from images."""
    discriminator_grad_norm: float | None
    """As grad_norm."""
    grad_norm: float
    """Of the autoencoder, mean over the steps, before clipping."""
    learning_rate: float
    """Of the last step."""
    psnr: float | None
    """Decibels, mean over the held-out images, with the averaged weights; None where it was not measured."""
    num_damaged: int
    """Images left out so far."""
    images_per_second: float
    data_wait: float
    """Share of the time spent waiting for data."""


def summarise(step: int, epoch: float, steps: list[StepMetrics], seconds: float, data_wait: float) -> Metrics:
    """The line that stands for `steps`, which took `seconds`, `data_wait` of them waiting."""
    last = steps[-1]
    means = {
        name: _mean([(getattr(s, name), s.num_images) for s in steps]) for name in ("loss", "l1", "kl", *OPTIONAL_TERMS)
    }
    measured = [s.psnr for s in steps if s.psnr is not None]
    return Metrics(
        step=step,
        epoch=epoch,
        **means,  # type: ignore[arg-type]  # None only for terms that may be None
        grad_norm=sum(s.grad_norm for s in steps) / len(steps),
        learning_rate=last.learning_rate,
        psnr=measured[-1] if measured else None,
        num_damaged=last.num_damaged,
        images_per_second=sum(s.num_images for s in steps) / seconds,
        data_wait=data_wait / seconds,
    )


def _mean(values: list[tuple[float | None, int]]) -> float | None:
    """Mean over the images of the steps in which a term was at work."""
    known = [(value, num_images) for value, num_images in values if value is not None]
    num_images = sum(n for _, n in known)
    return sum(value * n for value, n in known) / num_images if num_images else None

"""The metrics of an autoencoder's training step, and the line of metrics.jsonl that summarises a few of them."""

from dataclasses import dataclass

OPTIONAL_TERMS = ("lpips", "gan", "gan_weight", "discriminator_loss", "discriminator_grad_norm")
"""Terms that are None in steps that do not compute them."""


@dataclass(frozen=True)
class VAEStepMetrics:
    """One step, before its update. See `VAEMetrics`."""

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
class VAEMetrics:
    """One line: what happened since the previous line. All values except the last two are exact on a CPU."""

    step: int
    """Updates made so far."""
    epoch: float
    """Passes over the data so far."""
    loss: float
    """Of the autoencoder: the weighted sum of all terms, mean over the images. The terms below are unweighted means."""
    l1: float
    """Per pixel value; images span [-1, 1]."""
    kl: float
    """In nats per latent value."""
    lpips: float | None
    gan: float | None
    """Minus the discriminator's score of reconstructions: below 0 if they pass for images."""
    gan_weight: float | None
    """The adaptive weight, which loss.gan_weight multiplies."""
    discriminator_loss: float | None
    """1 if the discriminator cannot tell reconstructions from images."""
    discriminator_grad_norm: float | None
    """Like grad_norm, of the discriminator."""
    grad_norm: float
    """Of the autoencoder, mean over the steps, before clipping."""
    learning_rate: float
    """Of the last step."""
    psnr: float | None
    """In decibels, mean over the held-out images, with the averaged weights; None if it was not measured."""
    num_damaged: int
    """Images skipped so far."""
    images_per_second: float
    data_wait: float
    """Share of the time spent waiting for data."""


def summarise(step: int, epoch: float, steps: list[VAEStepMetrics], seconds: float, data_wait: float) -> VAEMetrics:
    """The line that summarises `steps`, which took `seconds`, `data_wait` of them waiting for data."""
    last = steps[-1]
    means = {
        name: _mean([(getattr(s, name), s.num_images) for s in steps]) for name in ("loss", "l1", "kl", *OPTIONAL_TERMS)
    }
    measured = [s.psnr for s in steps if s.psnr is not None]
    return VAEMetrics(
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
    """Mean over the images of the steps that computed a term; None if no step did."""
    known = [(value, num_images) for value, num_images in values if value is not None]
    num_images = sum(n for _, n in known)
    return sum(value * n for value, n in known) / num_images if num_images else None

"""The terms of an autoencoder's loss, and the hinge loss of its discriminator."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""The limits that diffusers sets: exp of much larger values is not finite."""
_MAX_GAN_WEIGHT = 1e4


class Posterior(NamedTuple):
    """A normal distribution of the latents of each image, float32 [B, C, h, w] both."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "Posterior":
        """The posterior that an encoder's output [B, 2 C, h, w] parametrises."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return cls(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def sample(self, noise: Tensor) -> Tensor:
        """Latents sampled with standard normal `noise` of their shape."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """Divergence from a standard normal: nats per latent value, mean over all, a scalar."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).mean()


def l1(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of pixel values, a scalar; images span [-1, 1]."""
    return (reconstructions.float() - images).abs().mean()


def generator_loss(fake_scores: Tensor) -> Tensor:
    """Low if the discriminator takes reconstructions for images, a scalar."""
    return -fake_scores.float().mean()


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Hinge loss, a scalar: 1 if all scores are 0, 0 if real patches score above 1 and reconstructed ones below -1."""
    return 0.5 * (F.relu(1 - real_scores.float()).mean() + F.relu(1 + fake_scores.float()).mean())


def adaptive_gan_weight(reconstruction: Tensor, gan: Tensor, last_layer: Tensor) -> Tensor:
    """The weight at which the loss `gan` pulls on `last_layer` as strongly as the loss `reconstruction` does.

    As in VQGAN: whatever the scale of its scores, the discriminator cannot dominate. Both graphs are kept.
    """
    pull = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    push = torch.autograd.grad(gan, last_layer, retain_graph=True)[0].norm()
    return (pull / (push + 1e-4)).clamp(0, _MAX_GAN_WEIGHT).detach()


def psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, float32 [B] in decibels. Values outside [-1, 1] are clamped."""
    error = (reconstructions.float().clamp(-1, 1) - images).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))

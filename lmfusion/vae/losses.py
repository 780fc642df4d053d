"""What is a good autoencoder? The terms of its loss, and the hinge loss of its adversary."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""As diffusers limits it: exp of anything larger would not be finite for long."""
_MAX_GAN_WEIGHT = 1e4


class Posterior(NamedTuple):
    """A normal distribution of the latents of each image, float32 [B, C, h, w] both."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> "Posterior":
        """What an encoder's output [B, 2 C, h, w] stands for."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return cls(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def draw(self, noise: Tensor) -> Tensor:
        """The latents that standard normal `noise` of their shape leads to."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """Divergence from a standard normal: nats per latent value, mean over all, a scalar."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).mean()


def l1(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Mean distance of a pixel value, a scalar; images span [-1, 1]."""
    return (reconstructions.float() - images).abs().mean()


def generator_loss(fake_scores: Tensor) -> Tensor:
    """Low where the discriminator takes reconstructions for images."""
    return -fake_scores.float().mean()


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Hinge loss: 1 where it cannot tell, 0 where real patches score above 1 and reconstructed ones below -1."""
    return 0.5 * (F.relu(1 - real_scores.float()).mean() + F.relu(1 + fake_scores.float()).mean())


def adaptive_gan_weight(reconstruction: Tensor, gan: Tensor, last_layer: Tensor) -> Tensor:
    """The weight at which the loss `gan` pulls on `last_layer` as strongly as the loss `reconstruction` does.

    As in VQGAN: it keeps the adversary from taking over whatever the scale of its scores. Both graphs are kept.
    """
    pull = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    push = torch.autograd.grad(gan, last_layer, retain_graph=True)[0].norm()
    return (pull / (push + 1e-4)).clamp(0, _MAX_GAN_WEIGHT).detach()


def psnr(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, float32 [B] in decibels. What lies outside [-1, 1] is cut off first."""
    error = (reconstructions.float().clamp(-1, 1) - images).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))

"""Builds autoencoders and their discriminators on diffusers' AutoencoderKL, and exports them for the codec."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmfusion.utils.folders import replace_folder
from lmfusion.vae.config import AutoencoderConfig, LossConfig
from lmfusion.vae.discriminator import PatchDiscriminator
from lmfusion.vae.losses import Posterior


class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL with the methods that training calls.

    Its weights are initialised from `seed`, without touching the global generator.
    """

    def __init__(self, config: AutoencoderConfig, seed: int) -> None:
        super().__init__()
        from diffusers import AutoencoderKL  # slow to import

        num_levels = len(config.block_out_channels)
        with _seeded(seed):
            self.kl: Any = AutoencoderKL(
                in_channels=config.channels,
                out_channels=config.channels,
                down_block_types=("DownEncoderBlock2D",) * num_levels,
                up_block_types=("UpDecoderBlock2D",) * num_levels,
                block_out_channels=tuple(config.block_out_channels),
                layers_per_block=config.layers_per_block,
                latent_channels=config.latent_channels,
                norm_num_groups=config.norm_num_groups,
                sample_size=config.image_size,
            )

    @property
    def last_layer(self) -> Tensor:
        """The weight that the gradient of the reconstruction reaches first."""
        return self.kl.decoder.conv_out.weight

    def encode(self, images: Tensor) -> Posterior:
        """Posterior [B, C, h, w] of images [B, channels, H, W] in [-1, 1]."""
        return Posterior.of(self.kl.quant_conv(self.kl.encoder(images)))

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, channels, H, W], roughly in [-1, 1], of latents [B, C, h, w]."""
        return self.kl.decode(latents, return_dict=False)[0]


def build_discriminator(config: AutoencoderConfig, loss: LossConfig, seed: int) -> PatchDiscriminator:
    """The discriminator that `loss` describes, with weights initialised from `seed`."""
    with _seeded(seed):
        return PatchDiscriminator(config.channels, loss.discriminator_channels, loss.discriminator_layers)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, weights are initialised from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def measure_latents(autoencoder: Autoencoder, images: Iterable[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation over all latent values of `images`, batches [B, channels, H, W] on any device.

    They are measured on the means of the posteriors, to which the codec encodes. Raises ValueError if these do not
    vary, which means that the autoencoder does not distinguish images.
    """
    count, total, squares = 0, 0.0, 0.0
    for batch in images:
        latents = autoencoder.encode(batch).mean.double()
        count += latents.numel()
        total += latents.sum().item()
        squares += latents.square().sum().item()
    mean = total / count
    std = max(0.0, squares / count - mean**2) ** 0.5
    if not std > 1e-6 * max(1.0, abs(mean)):
        raise ValueError(
            f"the latents must vary, got {mean:.4g} for all: the autoencoder does not distinguish images. Train it for "
            "longer, or lower loss.kl_weight"
        )
    return mean, std


def export(autoencoder: Autoencoder, folder: Path, mean: float, std: float) -> None:
    """Write `folder` as diffusers' save_pretrained does, so that its scaled latents have mean 0 and variance 1.

    It is written completely or not at all; an existing folder is replaced.
    """
    kl = autoencoder.kl
    kl.register_to_config(scaling_factor=1 / std, shift_factor=mean)
    replace_folder(folder, lambda new: kl.save_pretrained(new, safe_serialization=True), is_stale=lambda name: True)

"""Previews: a linear map from predicted clean latents to colours, fitted to the codec.

Decoding would cost more than the denoising step that it shows. But colours are nearly linear in the latents of every
autoencoder in use, which is good enough to watch an image appear.
"""

import math

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lmfusion.model.codec import Codec, PixelCodec

NUM_IMAGES = 48
"""Synthetic images that the map is fitted to."""
LATENT_SIDE = 8
"""Their height and width in latent pixels."""
_BATCH = 8


def preview_map(codec: Codec) -> Tensor:
    """Weights of the codec's latent channels and, in the last row, an offset: float32 [latent_channels + 1, 3].

    Gives red, green and blue in [0, 1], see `to_rgb`. It is exact for raw pixels; otherwise it is fitted by least
    squares to synthetic images that the codec encodes, and kept on the codec, so that only the first call takes time
    (seconds on a CPU with an autoencoder as large as Stable Diffusion's). It is on the CPU, and the same for the same
    codec.
    """
    kept = getattr(codec, "_preview_map", None)
    if kept is None:
        kept = _pixel_map(codec.latent_channels) if isinstance(codec, PixelCodec) else _fit(codec)
        codec._preview_map = kept
    assert isinstance(kept, Tensor)
    return kept


def to_rgb(x0: Tensor, preview_map: Tensor) -> Tensor:
    """Colours uint8 [B, h, w, 3] of clean latents [B, C, h, w], on their device, without waiting for the device.

    preview_map: from `preview_map(codec)`.
    """
    preview_map = preview_map.to(x0.device, non_blocking=True)
    rgb = x0.permute(0, 2, 3, 1).float() @ preview_map[:-1] + preview_map[-1]
    return (rgb.clamp(0, 1) * 255).round().to(torch.uint8)


def preview_image(rgb: Tensor, size: int) -> Image.Image:
    """A Pillow image of `size` pixels per side, like the finished one, from colours uint8 [h, w, 3] on the CPU.

    Latents of an autoencoder are enlarged smoothly; pixels stay as they are.
    """
    image = Image.fromarray(rgb.numpy())
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


def _pixel_map(channels: int) -> Tensor:
    weights = torch.eye(3) if channels == 3 else torch.ones(1, 3)
    return torch.cat([0.5 * weights, torch.full((1, 3), 0.5)])


def _fit(codec: Codec) -> Tensor:
    like = next(codec.parameters(), torch.empty(0))
    images = _synthetic_images(codec.config.channels, LATENT_SIDE * codec.downscale)
    latents = torch.cat([codec.encode(batch.to(like.device)).cpu() for batch in images.split(_BATCH)])
    colours = F.avg_pool2d((images + 1) / 2, codec.downscale).expand(-1, 3, -1, -1)
    features = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    features = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    targets = colours.permute(0, 2, 3, 1).flatten(0, 2).double()
    # gelsd: the system lacks full rank if one latent channel depends on others
    return torch.linalg.lstsq(features, targets, driver="gelsd").solution.float()


def _synthetic_images(channels: int, size: int) -> Tensor:
    """Smooth colours, gradients and shapes in turn: float32 [NUM_IMAGES, channels, size, size] in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    position = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(position, position, indexing="ij")
    images = []
    for i in range(NUM_IMAGES):
        colours = torch.rand(channels, 3, 3, generator=generator)
        numbers = torch.rand(4, 2, generator=generator)
        if i % 3 == 0:
            image = F.interpolate(colours[None], (size, size), mode="bilinear")[0]
        elif i % 3 == 1:
            angle = 2 * math.pi * float(numbers[0, 0])
            share = ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle) + 0.5).clamp(0, 1)
            image = colours[:, 0, 0, None, None].lerp(colours[:, 0, 1, None, None], share)
        else:
            image = colours[:, 0, 0, None, None].expand(channels, size, size)
            for (centre_x, centre_y), colour in zip(numbers.tolist(), colours.flatten(1).T[1:], strict=False):
                across, down = (x - centre_x).abs(), (y - centre_y).abs()
                inside = (across**2 + down**2).sqrt() < 0.3 if i % 2 else torch.maximum(across, down) < 0.25
                image = torch.where(inside, colour[:, None, None], image)
        images.append(image)
    return torch.stack(images) * 2 - 1

"""Patch coders: noisy latents to image tokens, and image tokens to predictions.

`unet` is the paper's: half a U-Net down (equation 6), the other half up (equation 14), with the timestep in both and
long skips from the first to the second. `linear` cuts the latent into squares and projects each: small, and enough
for small images.

Shapes: B images of C x h x w latents, L tokens per image.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from lmfusion.utils.config_values import short_repr

KINDS = ("unet", "linear")
LINEAR_TIME_CHANNELS = 256
MAX_PATCH_SIZE = 1024
MAX_CHANNELS = 2**16
MAX_BLOCKS = 100

Skip = tuple[Tensor, ...]
"""Feature maps that `encode` passes on to `decode` of the same images, which are their first dimension."""


@dataclass
class PatchCoderConfig:
    """Kind and size of a patch coder. Raises ValueError for an unknown kind or sizes that do not fit together."""

    kind: str = "unet"
    """"unet" or "linear"."""
    patch_size: int = 2
    """Side in latent pixels of the square that becomes one token."""
    channels: tuple[int, ...] = (640, 992)
    """unet: width of each level, from the full resolution down; each further level halves the sides, so patch_size is
    2 ** (levels - 1)."""
    num_blocks: int = 3
    """unet: residual blocks per level, in each direction. Defaults: 0.27 B parameters beside a tower of width 4,096."""

    def __post_init__(self) -> None:
        self.channels = tuple(self.channels)
        if self.kind not in KINDS:
            raise ValueError(f"patch_coder.kind must be one of {', '.join(KINDS)}, got {short_repr(self.kind)}")
        if not 1 <= self.patch_size <= MAX_PATCH_SIZE:
            raise ValueError(f"patch_size must be from 1 to {MAX_PATCH_SIZE:,} latent pixels, got {self.patch_size}")
        if self.kind == "unet":
            has_blocks = 1 <= self.num_blocks <= MAX_BLOCKS
            if not self.channels or min(self.channels) < 2 or max(self.channels) > MAX_CHANNELS or not has_blocks:
                raise ValueError(
                    f"channels of a unet must be from 2 to {MAX_CHANNELS:,} and num_blocks from 1 to {MAX_BLOCKS}, got "
                    f"channels {short_repr(self.channels)} and num_blocks {self.num_blocks}"
                )
            if len(self.channels) > MAX_PATCH_SIZE.bit_length() or self.patch_size != 2 ** (len(self.channels) - 1):
                raise ValueError(
                    f"patch_size of a unet of {len(self.channels)} levels must be {2 ** (len(self.channels) - 1)}, got "
                    f"{self.patch_size}; change patch_size or the number of channels"
                )


class PatchCoder(nn.Module, ABC):
    """Latents [B, C, h, w] at timesteps [B] to tokens [B * L, width], and tokens to predictions [B, C, h, w].

    Tokens follow the image left to right, top to bottom. Computes in the dtype of its weights and returns it; the
    caller casts the tokens to the dtype of the tower.
    """

    patch_size: int
    latent_channels: int
    width: int

    def tokens_per_image(self, height: int, width: int) -> int:
        """Tokens L that a latent of height x width becomes. Raises ValueError when it does not divide into patches."""
        size = self.patch_size
        if height < size or width < size or height % size or width % size:
            raise ValueError(
                f"sides of a latent must be multiples of the patch size {size}, got {height} x {width}; choose another "
                "image size"
            )
        return (height // size) * (width // size)

    def encode(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Skip]:
        """Tokens [B * L, width] of `latents` at `timesteps` (integer [B]), and the skip that `decode` needs.

        Raises ValueError when the latents' shape does not fit, or there is not one timestep per image.
        """
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents must have shape [B, {self.latent_channels}, h, w], got {tuple(latents.shape)}")
        if timesteps.shape != latents.shape[:1]:
            raise ValueError(
                f"timesteps must have shape [{latents.shape[0]}], one per image, got {tuple(timesteps.shape)}"
            )
        self.tokens_per_image(latents.shape[2], latents.shape[3])
        return self._encode(latents.to(self.dtype), timesteps)

    def decode(self, tokens: Tensor, timesteps: Tensor, skip: Skip) -> Tensor:
        """Prediction [B, C, h, w] from the tower's tokens [B * L, width], with `timesteps` and `skip` of `encode`.

        Raises ValueError when tokens, timesteps and skip do not belong to the same images.
        """
        num_images, height, width = timesteps.shape[0], skip[-1].shape[-2], skip[-1].shape[-1]
        if skip[-1].shape[0] != num_images or tokens.shape != (num_images * height * width, self.width):
            raise ValueError(
                f"tokens of {num_images} images of {height} x {width} patches must have shape "
                f"[{num_images * height * width}, {self.width}], got {tuple(tokens.shape)}"
            )
        return self._decode(tokens.to(self.dtype), timesteps, skip)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @abstractmethod
    def _encode(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Skip]: ...

    @abstractmethod
    def _decode(self, tokens: Tensor, timesteps: Tensor, skip: Skip) -> Tensor: ...


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through a small MLP: integer [B] to [B, out_channels]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.sinusoids = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(channels, out_channels)

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(timesteps).to(self.mlp.linear_1.weight.dtype))


class LinearPatchCoder(PatchCoder):
    """One linear map in, one out; the timestep's embedding is added to every token going in.

    The output map starts at zero: the first predictions are then the mean of the targets, and the loss starts at 1,
    whatever the tower's copied final norm gives.
    """

    def __init__(self, config: PatchCoderConfig, latent_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size, self.latent_channels, self.width = config.patch_size, latent_channels, width
        patch_values = latent_channels * config.patch_size**2
        self.in_proj = nn.Linear(patch_values, width)
        self.time_embedder = TimestepEmbedder(LINEAR_TIME_CHANNELS, width)
        self.out_proj = nn.Linear(width, patch_values)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def _encode(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Skip]:
        size = self.patch_size
        patches = latents.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C, grid_h, size, grid_w, size]
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # [B, grid_h, grid_w, C, size, size]
        tokens = self.in_proj(patches.flatten(3)) + self.time_embedder(timesteps)[:, None, None]
        grid = latents.new_empty(latents.shape[0], 0, *tokens.shape[1:3])  # holds only the shape of the patch grid
        return tokens.flatten(0, 2), (grid,)

    def _decode(self, tokens: Tensor, timesteps: Tensor, skip: Skip) -> Tensor:
        num_images, _, grid_height, grid_width = skip[0].shape
        size = self.patch_size
        patches = self.out_proj(tokens).view(num_images, grid_height, grid_width, self.latent_channels, size, size)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(num_images, -1, grid_height * size, grid_width * size)


class UNetPatchCoder(PatchCoder):
    """The two halves of a U-Net, with the image tower in the place of its middle.

    Every block on the way down passes its feature map along a long skip to the matching block on the way up. The last
    convolution starts at zero, as in every diffusion U-Net.
    """

    def __init__(self, config: PatchCoderConfig, latent_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size, self.latent_channels, self.width = config.patch_size, latent_channels, width
        channels, time_channels = config.channels, 4 * config.channels[0]
        self.time_embedder = TimestepEmbedder(channels[0], time_channels)
        self.conv_in = nn.Conv2d(latent_channels, channels[0], kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        self.downsample = nn.ModuleList()
        for i, out_channels in enumerate(channels):
            in_channels = channels[max(i - 1, 0)]
            if i > 0:
                # Under any name but "op", diffusers registers the convolution twice
                self.downsample.append(Downsample2D(in_channels, use_conv=True, name="op"))
            block_inputs = [in_channels] + [out_channels] * (config.num_blocks - 1)
            self.down.append(_level(block_inputs, out_channels, time_channels))
        self.in_proj = nn.Linear(channels[-1], width)

        self.out_proj = nn.Linear(width, channels[-1])
        self.up = nn.ModuleList()
        self.upsample = nn.ModuleList()
        for i in reversed(range(len(channels))):
            out_channels = channels[max(i - 1, 0)]
            self.up.append(_level([2 * channels[i]] * config.num_blocks, channels[i], time_channels))
            if i > 0:
                self.upsample.append(Upsample2D(channels[i], use_conv=True, out_channels=out_channels))
        self.norm_out = nn.GroupNorm(_num_groups(channels[0]), channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], latent_channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def _encode(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Skip]:
        time = self.time_embedder(timesteps)
        x = self.conv_in(latents)
        skip = []
        for i, level in enumerate(self.down):
            if i > 0:
                x = self.downsample[i - 1](x)
            assert isinstance(level, nn.ModuleList)
            for block in level:
                x = block(x, time)
                skip.append(x)
        return self.in_proj(x.permute(0, 2, 3, 1)).flatten(0, 2), tuple(skip)

    def _decode(self, tokens: Tensor, timesteps: Tensor, skip: Skip) -> Tensor:
        time = self.time_embedder(timesteps)
        num_images, _, grid_height, grid_width = skip[-1].shape
        x = self.out_proj(tokens).view(num_images, grid_height, grid_width, -1).permute(0, 3, 1, 2)
        features = reversed(skip)
        for i, level in enumerate(self.up):
            if i > 0:
                x = self.upsample[i - 1](x)
            assert isinstance(level, nn.ModuleList)
            for block in level:
                x = block(torch.cat([x, next(features)], dim=1), time)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


def _level(block_inputs: list[int], out_channels: int, time_channels: int) -> nn.ModuleList:
    """Residual blocks of one resolution, each from its input channels to `out_channels`."""
    return nn.ModuleList(
        ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=time_channels,
            groups=_num_groups(in_channels),
            groups_out=_num_groups(out_channels),
            time_embedding_norm="scale_shift",  # a shift alone could be undone by the norm after it
        )
        for in_channels in block_inputs
    )


def _num_groups(channels: int) -> int:
    """32 groups per norm, as usual, or fewer in a narrow level: a group of one channel would lose its mean."""
    num_groups = 32
    while num_groups > 1 and (channels % num_groups or channels // num_groups < 4):
        num_groups //= 2
    return num_groups


def build_patch_coder(config: PatchCoderConfig, latent_channels: int, width: int) -> PatchCoder:
    """A freshly initialised coder between latents of `latent_channels` and an image tower of `width`."""
    kind = {"unet": UNetPatchCoder, "linear": LinearPatchCoder}[config.kind]
    return kind(config, latent_channels, width)

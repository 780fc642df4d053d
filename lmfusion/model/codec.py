"""Frozen codecs between pixels and the latents that diffusion works on, behind one small interface."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmfusion.conversion.tokenizer import refuse_code
from lmfusion.utils.config_values import short_repr
from lmfusion.utils.hashing import file_sha256, values_sha256
from lmfusion.utils.json_files import read_json_object

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

KINDS = ("pixels", "autoencoder_kl", "autoencoder_tiny")
MAX_IMAGE_SIZE = 65_536


@dataclass
class CodecConfig:
    """Which codec, and the square image it takes.

    Raises ValueError for an unknown kind, an autoencoder without a path, or sizes out of range.
    """

    kind: str = "pixels"
    """"pixels" (the image is its own latent: small images), "autoencoder_kl" or "autoencoder_tiny" (diffusers)."""
    path: str | None = None
    """Local folder of the autoencoder, as diffusers' `save_pretrained` writes it: config.json and safetensors."""
    channels: int = 3
    """Image channels: 3 (RGB) or 1 (grey)."""
    image_size: int = 256
    """Height and width in pixels; images are centre-cropped and resized to it."""
    sha256: str | None = None
    """Digest of the autoencoder's weights file. Filled in at the first load, checked from then on: latents of
    another autoencoder would be noise to the image tower."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"codec.kind must be one of {', '.join(KINDS)}, got {short_repr(self.kind)}")
        if self.kind != "pixels" and self.path is None:
            raise ValueError(f"codec {self.kind!r} needs a path: the local folder of a diffusers autoencoder")
        if self.kind == "pixels" and self.path is not None:
            raise ValueError(
                "codec.path must be left out for codec 'pixels', which has no weights, got "
                f"{short_repr(self.path)}; choose a kind of autoencoder, or leave it out"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"codec.channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size must be from 1 to {MAX_IMAGE_SIZE:,} pixels, got {self.image_size}")


class Codec(nn.Module, ABC):
    """Images [B, channels, H, W] in [-1, 1] to latents [B, latent_channels, h, w] of about unit variance, and back.

    Frozen: no gradient is recorded in either direction, and no parameter requires one. Both directions are
    deterministic and return the dtype of their input, whatever the dtype of the weights.
    """

    config: CodecConfig
    latent_channels: int
    downscale: int
    """Pixels per latent pixel, along each side."""
    latent_range: float
    """Latents lie in [-latent_range, latent_range]; samplers clip their predictions to it."""
    has_posterior: bool
    """Whether latents are the mean of a distribution whose standard deviation `moments` gives."""

    @property
    def latent_size(self) -> int:
        """Height and width of the latents of an image of the configured size."""
        return self.config.image_size // self.downscale

    def encode(self, images: Tensor) -> Tensor:
        """Latents of `images`. Raises ValueError for other channels, or sides not divisible by `downscale`."""
        return self.moments(images)[0]

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the latents of `images`, both [B, latent_channels, h, w].

        The mean is what `encode` gives. None for the standard deviation where the codec has no posterior. Raises what
        `encode` raises.
        """
        if images.dim() != 4 or images.shape[1] != self.config.channels:
            raise ValueError(f"images must have shape [B, {self.config.channels}, H, W], got {tuple(images.shape)}")
        if images.shape[2] % self.downscale or images.shape[3] % self.downscale:
            raise ValueError(
                f"sides of images must be multiples of {self.downscale} pixels, got {images.shape[2]} x "
                f"{images.shape[3]}"
            )
        with torch.no_grad():
            return self._moments(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1] of latents [B, latent_channels, h, w]. Raises ValueError for another shape."""
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents must have shape [B, {self.latent_channels}, h, w], got {tuple(latents.shape)}")
        with torch.no_grad():
            return self._decode(latents).clamp(-1, 1)

    def identity(self) -> dict[str, Any]:
        """What the latents of an image depend on, as plain values: equal values mean equal latents."""
        config = self.config
        return {
            "kind": config.kind,
            "channels": config.channels,
            "image_size": config.image_size,
            "weights_sha256": config.sha256,
        }

    @abstractmethod
    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor: ...


class PixelCodec(Codec):
    """The image is its own latent."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = config.channels
        self.downscale = 1
        self.latent_range = 1.0
        self.has_posterior = False

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return images, None

    def _decode(self, latents: Tensor) -> Tensor:
        return latents


class AutoencoderCodec(Codec):
    """A frozen diffusers AutoencoderKL (mode of its posterior) or AutoencoderTiny."""

    def __init__(self, config: CodecConfig, autoencoder: Any) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        settings: Any = autoencoder.config
        if settings.in_channels != config.channels:
            raise ValueError(
                f"codec.channels must be {settings.in_channels} for the autoencoder in {config.path}, got "
                f"{config.channels}"
            )
        self.latent_channels = settings.latent_channels
        widths = (
            settings.encoder_block_out_channels if config.kind == "autoencoder_tiny" else settings.block_out_channels
        )
        self.downscale = 2 ** (len(widths) - 1)
        if config.image_size % self.downscale:
            raise ValueError(
                f"image_size must be a multiple of {self.downscale} pixels, the autoencoder's downscale, got "
                f"{config.image_size}"
            )
        self.latent_range = 5.0  # standard deviations, which the latents of real images do not exceed
        self.has_posterior = config.kind == "autoencoder_kl"
        self.shift, self.scale = self._shift_and_scale(settings)

    def _shift_and_scale(self, settings: Any) -> tuple[Tensor | float, Tensor | float]:
        """The terms of latents = (encoded - shift) * scale: one number, or one per channel."""
        scale = settings.scaling_factor if settings.scaling_factor is not None else 1.0
        mean, std = settings.get("latents_mean"), settings.get("latents_std")
        if mean is not None and std is not None:
            return torch.tensor(mean).view(-1, 1, 1), scale / torch.tensor(std).view(-1, 1, 1)
        return settings.get("shift_factor") or 0.0, scale

    def identity(self) -> dict[str, Any]:
        # The file of the weights holds neither the scale of the latents nor how the layers are connected
        settings = {key: value for key, value in self.autoencoder.config.items() if not key.startswith("_")}
        return super().identity() | {"settings_sha256": values_sha256(settings)}

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self.autoencoder.encode(images.to(self.autoencoder.dtype))
        shift, scale = (_like(x, images) for x in (self.shift, self.scale))
        if not self.has_posterior:
            return (output.latents.to(images.dtype) - shift) * scale, None
        posterior = output.latent_dist
        return (posterior.mode().to(images.dtype) - shift) * scale, posterior.std.to(images.dtype) * scale

    def _decode(self, latents: Tensor) -> Tensor:
        shift, scale = (_like(x, latents) for x in (self.shift, self.scale))
        return self.autoencoder.decode((latents / scale + shift).to(self.autoencoder.dtype)).sample.to(latents.dtype)


def _like(x: Tensor | float, other: Tensor) -> Tensor | float:
    return x.to(other) if isinstance(x, Tensor) else x


def load_codec(config: CodecConfig) -> Codec:
    """The codec that `config` describes, in float32 on the CPU. Fills in `config.sha256` where it is None.

    A relative path starts at the working directory; `~` is the home folder.

    Raises FileNotFoundError where the folder or its safetensors file is missing, ValueError where the file is damaged,
    is not the one whose digest the config holds, or does not fit the configured image.
    """
    if config.kind == "pixels":
        return PixelCodec(config)
    import diffusers  # slow to import, and only these codecs need it

    assert config.path is not None
    kind = {"autoencoder_kl": diffusers.AutoencoderKL, "autoencoder_tiny": diffusers.AutoencoderTiny}[config.kind]
    folder = Path(config.path).expanduser()
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        moved = "" if config.sha256 is None else "; if it has moved since the model was saved, pass codec_path="
        raise FileNotFoundError(
            f"no autoencoder at {config.path}: {WEIGHTS_NAME} is missing; path must be a local folder written by "
            f"diffusers' save_pretrained{moved}"
        )
    settings = folder / "config.json"
    try:
        class_name = read_json_object(settings, strict=False).get("_class_name")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the autoencoder in {config.path}: {error}") from error
    if class_name != kind.__name__:
        raise ValueError(
            f"{config.path} must hold an {kind.__name__} for codec kind {config.kind!r}, got {short_repr(class_name)}"
        )
    refuse_code(folder, (settings.name,))
    digest = file_sha256(weights)
    if config.sha256 not in (None, digest):
        raise ValueError(
            f"{weights} must have the sha256 {config.sha256} of the autoencoder that this model was made with, got "
            f"{digest}; give the place of the original with codec_path="
        )
    try:
        autoencoder = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever diffusers and safetensors raise on a damaged or foreign folder
        raise ValueError(f"cannot load the autoencoder in {config.path}: {error}") from error
    codec = AutoencoderCodec(config, autoencoder)
    config.sha256 = digest
    return codec

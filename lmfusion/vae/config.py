"""What does the training of an autoencoder consist of? Dataclasses, read from a YAML recipe."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lmfusion.data.config import SourceConfig
from lmfusion.training.config import DEVICES, DTYPES, CheckpointConfig, ValidationConfig, read_recipe
from lmfusion.utils.config_values import check_least, short_repr
from lmfusion.vae import discriminator, lpips


@dataclass
class AutoencoderConfig:
    """A diffusers AutoencoderKL. The defaults have 84 M parameters: 256 x 256 pixels to latents of 8 x 32 x 32."""

    channels: int = 3
    """Image channels: 3 (RGB) or 1 (grey)."""
    image_size: int = 256
    """Height and width in pixels; images are centre-cropped and resized to it."""
    latent_channels: int = 8
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Channels of each level, from the pixels inwards. Each level but the last halves height and width."""
    layers_per_block: int = 2
    """Residual blocks a level in the encoder; the decoder has one more."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""

    def __post_init__(self) -> None:
        check_least(self, "autoencoder", image_size=1, latent_channels=1, layers_per_block=1, norm_num_groups=1)
        if self.channels not in (1, 3):
            raise ValueError(f"autoencoder.channels is {self.channels}; images have 1 (grey) or 3 (RGB)")
        if not self.block_out_channels:
            raise ValueError("autoencoder.block_out_channels is empty; write the channels of one level or more")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise ValueError(
                    f"autoencoder.block_out_channels has a {width}; they are multiples of norm_num_groups, "
                    f"{self.norm_num_groups}"
                )
        if self.image_size % self.downscale:
            raise ValueError(
                f"autoencoder.image_size is {self.image_size}; with {len(self.block_out_channels)} levels it is a "
                f"multiple of {self.downscale}"
            )

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.image_size // self.downscale
        return self.latent_channels, size, size


@dataclass
class ImageDataConfig:
    """Which images. Captions are not looked at, and a folder needs none."""

    sources: list[SourceConfig]
    """Mixed by their weights."""
    shuffle_blocks: int | None = None
    """None: in an order over all images. n: over n tars, or row groups, at a time, for storage that reads in runs."""
    max_damaged: float = 0.01
    """Images that cannot be read are left out and named in damaged.jsonl; a larger share of them ends the run."""
    num_workers: int = 1
    """Threads that prepare images ahead of the step that needs them."""
    cache_megabytes: int = 1024
    """Prepared images are kept in memory up to this size, so that small sets are decoded once."""

    def __post_init__(self) -> None:
        check_least(self, "data", shuffle_blocks=1, max_damaged=0, num_workers=1, cache_megabytes=0)
        if not self.sources:
            raise ValueError("data.sources is empty; name one or more")
        if self.max_damaged > 1:
            raise ValueError(f"data.max_damaged is {self.max_damaged}; it is a share, 0 to 1")


@dataclass
class LossConfig:
    """What a good reconstruction is: the mean L1 distance of a pixel value plus the terms below."""

    kl_weight: float = 1e-6
    """Of the KL divergence between the posterior and a standard normal, summed over the latents and divided by the
    number of the image's values (so it weighs against the L1 as in latent diffusion's code)."""
    lpips_weight: float = 0.0
    """Of the perceptual distance LPIPS. 0: none."""
    vgg16: str | None = None
    """Safetensors file of the VGG-16 that LPIPS sees with; `package:name/file` for one inside a Python package."""
    gan_weight: float = 0.0
    """Of the adversarial term, relative to the gradient of L1 and LPIPS at the decoder's last layer. 0: none."""
    gan_start: int = 50_000
    """Steps without the adversarial term, in which the discriminator is not trained either."""
    discriminator_channels: int = 64
    """Of its first layer; it widens eightfold."""
    discriminator_layers: int = 3
    """Three judge patches of 70 x 70 pixels."""

    def __post_init__(self) -> None:
        check_least(self, "loss", kl_weight=0, lpips_weight=0, gan_weight=0, gan_start=0)
        check_least(self, "loss", discriminator_channels=1, discriminator_layers=1)
        if (self.lpips_weight > 0) != (self.vgg16 is not None):
            raise ValueError(
                f"loss.lpips_weight is {self.lpips_weight} and loss.vgg16 is {short_repr(self.vgg16)}; "
                "LPIPS needs a weight above 0 and the file of a VGG-16, or neither"
            )
        width = self.discriminator_channels
        if width > 32 and width % 32:
            raise ValueError(f"loss.discriminator_channels is {width}; above 32 it is a multiple of 32")


@dataclass
class VAETrainConfig:
    """How long, how fast and where. The optimiser is AdamW."""

    num_steps: int = 1_000_000
    batch_size: int = 32
    """Images a step."""
    learning_rate: float = 1e-4
    """After warm-up; from there it falls along a cosine. The discriminator's is the same."""
    min_learning_rate: float = 1e-5
    """At the last step."""
    warmup_steps: int = 1000
    betas: tuple[float, float] = (0.5, 0.9)
    """Of both optimisers; a small first one, as is usual where an adversary moves too."""
    eps: float = 1e-8
    weight_decay: float = 0.0
    """On matrices and convolutions."""
    max_grad_norm: float = 1.0
    """Gradients of a larger total norm are scaled down to it."""
    ema_decay: float = 0.9999
    """Of the running average of the weights, which is what is measured, drawn and exported. In early steps
    (1 + step) / (10 + step) holds where it is less. 0: no averaging."""
    dtype: str = "float32"
    """"float32" or "bfloat16": of the activations. Weights are always float32."""
    recompute: bool = False
    """Compute activations again in the backward instead of keeping them: less memory, more time, same gradients."""
    seed: int = 0
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu" or "cuda"."""
    log_every: int = 10
    """Steps a line of metrics.jsonl."""

    def __post_init__(self) -> None:
        check_least(self, "train", num_steps=1, batch_size=1, warmup_steps=0, log_every=1, seed=0)
        check_least(self, "train", min_learning_rate=0, weight_decay=0)
        for name in ("learning_rate", "eps", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be a positive number")
        for name, value in (("betas", max(self.betas)), ("betas", min(self.betas)), ("ema_decay", self.ema_decay)):
            if not 0 <= value < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; 0 up to, but not including, 1")
        for name, limit in (("warmup_steps", self.num_steps), ("min_learning_rate", self.learning_rate)):
            if getattr(self, name) > limit:
                of = "num_steps" if name == "warmup_steps" else "learning_rate"
                raise ValueError(f"train.{name} is {getattr(self, name)}, more than train.{of}, {limit}")
        for name, choices in (("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                given = short_repr(getattr(self, name))
                raise ValueError(f"train.{name} is {given}; it must be one of {', '.join(choices)}")


@dataclass
class VAEConfig:
    """One training of an autoencoder."""

    output: str
    """Folder of the run: checkpoints, metrics.jsonl, pictures, and the autoencoder. A run resumes from its folder."""
    data: ImageDataConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: VAETrainConfig = field(default_factory=VAETrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Here the PSNR is measured, and originals are drawn above their reconstructions."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        self.output = str(Path(self.output).expanduser())
        size, loss = self.autoencoder.image_size, self.loss
        needed = {
            "LPIPS": lpips.SMALLEST_IMAGE if loss.lpips_weight else 1,
            "the discriminator": discriminator.smallest_image(loss.discriminator_layers) if loss.gan_weight else 1,
        }
        for judge, least in needed.items():
            if size < least:
                raise ValueError(
                    f"autoencoder.image_size is {size}; {judge} needs images of {least} pixels or more, "
                    "set its weight to 0"
                )


def load_vae_config(recipe: str | Path, overrides: Iterable[str] = ()) -> VAEConfig:
    """The training run of an autoencoder that a YAML recipe describes; see `read_recipe`."""
    return read_recipe(VAEConfig, recipe, overrides)

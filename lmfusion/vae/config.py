"""The configuration of an autoencoder's training run: dataclasses, read from a YAML recipe."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lmfusion.data.config import SourceConfig
from lmfusion.training.config import CheckpointConfig, OptimizerConfig, ValidationConfig
from lmfusion.utils.config_values import check_least, short_repr
from lmfusion.utils.recipes import read_recipe
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
            raise ValueError(f"autoencoder.channels must be 1 (grey) or 3 (RGB), got {self.channels}")
        if not self.block_out_channels:
            raise ValueError("autoencoder.block_out_channels must name the channels of at least one level, got none")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise ValueError(
                    f"autoencoder.block_out_channels must be multiples of norm_num_groups, {self.norm_num_groups}, "
                    f"got {width}"
                )
        if self.image_size % self.downscale:
            raise ValueError(
                f"autoencoder.image_size must be a multiple of {self.downscale} pixels with "
                f"{len(self.block_out_channels)} levels, got {self.image_size}"
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
    """The images to train on. Captions are ignored, and a folder needs none."""

    sources: list[SourceConfig]
    """Mixed by their weights."""
    shuffle_blocks: int | None = None
    """None: shuffle all images at once. n: shuffle n tars, or row groups, at a time, for storage that is fast only when
    it is read in order."""
    max_damaged: float = 0.01
    """Images that cannot be read are skipped and named in damaged.jsonl; a larger share of them ends the run."""
    num_workers: int = 1
    """Threads that prepare images ahead of the step that needs them."""
    cache_megabytes: int = 1024
    """Memory for prepared images, so that small data sets are decoded only once."""

    def __post_init__(self) -> None:
        check_least(self, "data", shuffle_blocks=1, max_damaged=0, num_workers=1, cache_megabytes=0)
        if not self.sources:
            raise ValueError("data.sources must name at least one source, got none")
        if self.max_damaged > 1:
            raise ValueError(f"data.max_damaged must be a share between 0 and 1, got {self.max_damaged}")


@dataclass
class LossConfig:
    """The loss of a reconstruction: the mean L1 distance of its pixel values plus the terms below."""

    kl_weight: float = 1e-6
    """Weight of the KL divergence between the posterior and a standard normal, summed over the latents and divided by
    the number of the image's values (so it weighs against the L1 as in latent diffusion's code)."""
    lpips_weight: float = 0.0
    """Weight of the perceptual distance LPIPS. 0: none."""
    vgg16: str | None = None
    """Safetensors file of the VGG-16 that LPIPS uses; `package:name/file` for one inside a Python package."""
    gan_weight: float = 0.0
    """Weight of the adversarial term, relative to the gradient of L1 and LPIPS at the decoder's last layer. 0: none."""
    gan_start: int = 50_000
    """Steps before the adversarial term is added; until then the discriminator is not trained either."""
    discriminator_channels: int = 64
    """Channels of the discriminator's first layer; later layers have up to eight times as many."""
    discriminator_layers: int = 3
    """Three layers judge patches of 70 x 70 pixels."""

    def __post_init__(self) -> None:
        check_least(self, "loss", kl_weight=0, lpips_weight=0, gan_weight=0, gan_start=0)
        check_least(self, "loss", discriminator_channels=1, discriminator_layers=1)
        if (self.lpips_weight > 0) != (self.vgg16 is not None):
            raise ValueError(
                "loss.lpips_weight must be above 0 if and only if loss.vgg16 names a file, got "
                f"lpips_weight {self.lpips_weight} and vgg16 {short_repr(self.vgg16)}"
            )
        width = self.discriminator_channels
        if width > 32 and width % 32:
            raise ValueError(f"loss.discriminator_channels must be at most 32 or a multiple of 32, got {width}")


@dataclass
class VAETrainConfig(OptimizerConfig):
    """Length, speed and place of a run. The autoencoder and its discriminator have the same AdamW and schedule."""

    num_steps: int = 1_000_000
    batch_size: int = 32
    """Images per step."""
    min_learning_rate: float = 1e-5
    """At the last step."""
    warmup_steps: int = 1000
    betas: tuple[float, float] = (0.5, 0.9)
    """Of both optimizers; the first one is small, as is usual in adversarial training."""
    weight_decay: float = 0.0
    """On matrices and convolutions."""
    recompute: bool = False
    """Compute activations again in the backward instead of keeping them: less memory, more time, same gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "train", batch_size=1)


@dataclass
class VAEConfig:
    """One training of an autoencoder."""

    output: str
    """Folder of the run: checkpoints, metrics.jsonl, reconstructions and the autoencoder. A run resumes from its
    folder."""
    data: ImageDataConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: VAETrainConfig = field(default_factory=VAETrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The PSNR is measured on these images, and a picture shows originals above their reconstructions."""
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
                    f"autoencoder.image_size must be at least {least} pixels for {judge}, got {size}; "
                    "raise it, or set the weight of that term to 0"
                )


def load_vae_config(recipe: str | Path, overrides: Iterable[str] = ()) -> VAEConfig:
    """The autoencoder's training run that a YAML recipe describes; see `read_recipe`."""
    return read_recipe(VAEConfig, recipe, overrides)

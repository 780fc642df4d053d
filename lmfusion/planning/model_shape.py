"""The sizes of a run's model: what its memory, FLOPs and traffic are calculated from."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.towers import ImageTower, TextTower


@dataclass(frozen=True)
class WeightShape:
    """One parameter of the towers."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def is_in_layer(self) -> bool:
        return ".layers." in self.name

    def on_largest_rank(self, num_ranks: int) -> int:
        """Parameters on the rank that holds most, if FSDP2 divides dimension 0 among `num_ranks`."""
        return -(-self.shape[0] // num_ranks) * math.prod(self.shape[1:])


@dataclass(frozen=True)
class CodecShape:
    """Sizes of the codec."""

    latent_shape: tuple[int, int, int]
    """(C, h, w) of an image of the configured size."""
    num_parameters: int = 0
    encode_flops: int = 0
    """Of one image: convolutions and linear maps, without the one attention in the middle."""
    is_assumed: bool = False
    """Whether there is no autoencoder yet, and its sizes are a guess."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of both towers, the codec and the vision encoder."""

    config: LMFusionConfig
    codec: CodecShape
    num_vision_parameters: int = 0

    @cached_property
    def weights(self) -> list[WeightShape]:
        """Every parameter of both towers, by its name in the model."""
        config, latent_channels = self.config, self.codec.latent_shape[0]
        with torch.device("meta"):
            towers = nn.ModuleDict(
                {"text": TextTower(config.text_config), "image": ImageTower(config, latent_channels)}
            )
        return [WeightShape(name, tuple(parameter.shape)) for name, parameter in towers.named_parameters()]

    def trained(self, frozen_text: bool) -> list[WeightShape]:
        return [weight for weight in self.weights if not (frozen_text and weight.name.startswith("text."))]

    def frozen(self, frozen_text: bool) -> list[WeightShape]:
        return [weight for weight in self.weights if frozen_text and weight.name.startswith("text.")]


def count_parameters(weights: list[WeightShape]) -> int:
    """Parameters of `weights` together."""
    return sum(weight.num_parameters for weight in weights)

"""The diffusion process in training: noise, timesteps and targets, on a diffusers scheduler."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from lmfusion.utils.config_values import short_repr

MAX_TIMESTEPS = 100_000
PREDICTION_TYPES = ("epsilon", "v_prediction")

# beta_start and beta_end are those of Ho et al. (linear) and of Stable Diffusion (scaled_linear); cosine has none
_SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}


@dataclass
class DiffusionConfig:
    """The diffusion process and its place in the loss.

    Raises ValueError for an unknown name or a number out of range.
    """

    prediction_type: str = "epsilon"
    """What the network predicts: "epsilon" (the noise) or "v_prediction"."""
    schedule: str = "cosine"
    """Noise schedule: "cosine" (Nichol and Dhariwal), "linear" or "scaled_linear"."""
    num_train_timesteps: int = 1000
    loss_weight: float = 5.0
    """Factor of the diffusion loss beside the language-model loss (the paper's lambda)."""
    image_first_max_timestep: int = 500
    """Images before their caption get timesteps up to this one, so that the caption can be predicted from the image."""

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {short_repr(self.prediction_type)}"
            )
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {short_repr(self.schedule)}")
        if not 2 <= self.num_train_timesteps <= MAX_TIMESTEPS:
            raise ValueError(f"num_train_timesteps must be from 2 to {MAX_TIMESTEPS:,}, got {self.num_train_timesteps}")
        if not (math.isfinite(self.loss_weight) and self.loss_weight >= 0):
            raise ValueError(f"loss_weight must be a finite number of at least 0, got {self.loss_weight}")
        if not 0 <= self.image_first_max_timestep < self.num_train_timesteps:
            raise ValueError(
                f"image_first_max_timestep must be from 0 to {self.num_train_timesteps - 1}, got "
                f"{self.image_first_max_timestep}"
            )


def scheduler_config(config: DiffusionConfig) -> dict[str, Any]:
    """The configuration of a diffusers scheduler that fits the model, for example of `EulerDiscreteScheduler`.

    Steps begin at pure noise. Clipping is left to `lmfusion.generation.samplers`.
    """
    return {
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": config.prediction_type,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "skip_prk_steps": True,  # PNDM's first steps would start where there is next to no signal
        **_SCHEDULES[config.schedule],
    }


class Diffusion:
    """The forward process, for training. It has no weights. `lmfusion.generation.samplers` reverses it."""

    alphas_cumprod: Tensor
    """The share of signal in the variance of a noised latent, float64 [num_train_timesteps] on the CPU."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self._scheduler = DDPMScheduler.from_config(scheduler_config(config))
        self.alphas_cumprod = self._scheduler.alphas_cumprod.double()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents [B, C, h, w] noised to their own `timesteps` (int64 [B]), in the dtype of `latents`."""
        return self._scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict for `add_noise(latents, noise, timesteps)`."""
        if self.config.prediction_type == "epsilon":
            return noise
        return self._scheduler.get_velocity(latents, noise, timesteps)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of each image, float32 or wider [B]."""
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(dim=1)

"""What noise is added in training, what must the network predict, how do samplers undo it? On diffusers schedulers."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")
SAMPLERS = ("ddpm", "ddim", "dpm-solver")

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
    """Images that come before their caption get timesteps up to this one, so the caption can be read off the image."""

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction_type {self.prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"unknown noise schedule {self.schedule!r}; known: {', '.join(_SCHEDULES)}")
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; it must be at least 2")
        if not (math.isfinite(self.loss_weight) and self.loss_weight >= 0):
            raise ValueError(f"loss_weight is {self.loss_weight}; it must be a finite number, 0 or more")
        if not 0 <= self.image_first_max_timestep < self.num_train_timesteps:
            raise ValueError(
                f"image_first_max_timestep is {self.image_first_max_timestep}; "
                f"timesteps are 0 to {self.num_train_timesteps - 1}"
            )


class Diffusion:
    """Training side of the process, and the samplers that go with it. Holds no weights."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self._scheduler = DDPMScheduler(**self._settings())

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

    def sampler(self, name: str, num_steps: int, clip_range: float) -> "Sampler":
        """A fresh sampler: "ddpm" (ancestral), "ddim" (deterministic) or "dpm-solver" (DPM-Solver++ 2M).

        Predicted clean latents are clipped to [-clip_range, clip_range]: near the last timestep of the cosine
        schedule an error in a predicted epsilon is amplified thousands of times, and without clipping few steps
        diverge.

        Raises ValueError for an unknown name or num_steps outside 1 to num_train_timesteps.
        """
        num_train_timesteps = self.config.num_train_timesteps
        if not 1 <= num_steps <= num_train_timesteps:
            raise ValueError(f"num_steps is {num_steps}; the diffusion has 1 to {num_train_timesteps} steps")
        scheduler: DDPMScheduler | DPMSolverMultistepScheduler
        if name == "ddpm":
            scheduler = DDPMScheduler(**self._settings(), clip_sample=True, clip_sample_range=clip_range)
        elif name in ("ddim", "dpm-solver"):
            # DPM-Solver++ of order 1 is DDIM; diffusers' own DDIMScheduler errs on step counts that do not divide 1,000
            order = 1 if name == "ddim" else 2
            scheduler = _ClippedDPMSolver(
                **self._settings(), solver_order=order, thresholding=True, sample_max_value=clip_range
            )
        else:
            raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
        # "Trailing" spacing, so that the first step starts at the timestep of pure noise
        timesteps = np.linspace(num_train_timesteps, 0, num_steps, endpoint=False).round().astype(int) - 1
        scheduler.set_timesteps(timesteps=timesteps.tolist())
        return Sampler(scheduler, timesteps.tolist())

    def _settings(self) -> dict[str, Any]:
        return {
            "num_train_timesteps": self.config.num_train_timesteps,
            "prediction_type": self.config.prediction_type,
            **_SCHEDULES[self.config.schedule],
        }


class Sampler:
    """One run from noise to clean latents: for each of `timesteps`, predict and `step`."""

    timesteps: list[int]
    """Descending; each is the t the network is told."""

    def __init__(self, scheduler: DDPMScheduler | DPMSolverMultistepScheduler, timesteps: list[int]) -> None:
        self.timesteps = timesteps
        self._scheduler = scheduler

    def step(self, prediction: Tensor, timestep: int, latents: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Latents [B, C, h, w] at the next timestep, from the network's `prediction` at this one.

        generators: one an image, for samplers that add noise, so that an image does not depend on its neighbours.
        """
        if isinstance(self._scheduler, DDPMScheduler):
            return self._scheduler.step(prediction, timestep, latents, generator=generators, return_dict=False)[0]
        return self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]


class _ClippedDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ that clips predicted clean latents to a fixed range, as the other samplers do.

    Its parent would divide by the range too, which suits [-1, 1] alone.
    """

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        limit = self.config["sample_max_value"]
        return sample.clamp(-limit, limit)

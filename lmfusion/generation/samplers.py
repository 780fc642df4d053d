"""Samplers: DDPM, DDIM and DPM-Solver++ as tables of coefficients, and any diffusers scheduler.

The three differ only in six numbers per step. With these in a table, one set of operations advances images that are at
different steps of different samplers, and the device needs nothing else from the host.
"""

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from lmfusion.generation.options import SAMPLERS, unknown_sampler
from lmfusion.model.diffusion import Diffusion

NUM_COEFFICIENTS = 6


@dataclass(frozen=True)
class StepTable:
    """One run from noise to clean latents. Each row holds the coefficients that `advance` takes for one step."""

    timesteps: tuple[int, ...]
    """The network's input t of each step, descending."""
    coefficients: Tensor
    """float32 [num_steps, 6] on the CPU, c0 to c5 of

        x0 = clamp(c0 * x + c1 * prediction, -clip, clip)
        x_next = c2 * x + c3 * x0 + c4 * x0_previous + c5 * noise
    """
    clip: float
    """Predicted clean latents are kept within [-clip, clip]."""


def step_table(diffusion: Diffusion, name: str, num_steps: int, clip: float) -> StepTable:
    """The run of "ddpm" (ancestral), "ddim" (deterministic) or "dpm-solver" (DPM-Solver++ 2M, of order 1 at both ends).

    Predicted clean latents are clipped to [-clip, clip]: near the last timestep of the cosine schedule an error in a
    predicted epsilon is amplified thousands of times, and without clipping few steps diverge. Only "ddpm" adds noise
    (c5), only "dpm-solver" uses the step before (c4), and the last step of each does neither.

    Raises ValueError for an unknown name or num_steps outside 1 to num_train_timesteps.
    """
    if name not in SAMPLERS:
        raise ValueError(unknown_sampler(name))
    num_train_timesteps = diffusion.config.num_train_timesteps
    _check_num_steps(num_steps, num_train_timesteps)
    # "Trailing" spacing, so that the first step starts at the timestep of pure noise
    timesteps = np.linspace(num_train_timesteps, 0, num_steps, endpoint=False).round().astype(int) - 1
    squared_alphas = diffusion.alphas_cumprod[torch.from_numpy(timesteps)]
    squared_alphas = torch.cat([squared_alphas, squared_alphas.new_ones(1)])  # the last step ends at clean latents
    alpha, sigma = squared_alphas.sqrt(), (1 - squared_alphas).sqrt()

    table = torch.zeros(num_steps, NUM_COEFFICIENTS, dtype=torch.float64)
    if diffusion.config.prediction_type == "epsilon":
        table[:, 0], table[:, 1] = 1 / alpha[:-1], -sigma[:-1] / alpha[:-1]
    else:
        table[:, 0], table[:, 1] = alpha[:-1], -sigma[:-1]
    if name == "ddpm":
        _fill_ancestral(table, squared_alphas)
    else:
        # DPM-Solver++ of order 1 is DDIM; diffusers' DDIMScheduler is wrong for step counts that do not divide 1,000
        _fill_solver(table, alpha, sigma, order=1 if name == "ddim" else 2)
    return StepTable(tuple(timesteps.tolist()), table.float(), float(clip))


def _fill_ancestral(table: Tensor, squared_alphas: Tensor) -> None:
    """Mean and deviation of q(x_next | x, x0): equations 6 and 7 of Ho et al."""
    now, following = squared_alphas[:-1], squared_alphas[1:]
    beta = 1 - now / following
    table[:, 2] = (now / following).sqrt() * (1 - following) / (1 - now)
    table[:, 3] = following.sqrt() * beta / (1 - now)
    table[:, 5] = ((1 - following) / (1 - now) * beta).sqrt()


def _fill_solver(table: Tensor, alpha: Tensor, sigma: Tensor, order: int) -> None:
    """DPM-Solver++ (Lu et al. 2022): first order, and the second-order midpoint rule between both ends."""
    # exp(-h), h being the growth of log(alpha / sigma) within the step; 0 in the last step, where h is infinite
    shrinkage = (sigma[1:] / sigma[:-1]) * (alpha[:-1] / alpha[1:])
    weight = alpha[1:] * (1 - shrinkage)
    table[:, 2] = sigma[1:] / sigma[:-1]
    table[:, 3] = weight
    if order == 2 and len(table) > 2:
        growth = -shrinkage[:-1].log()
        extrapolation = 0.5 * weight[1:-1] * growth[1:] / growth[:-1]
        table[1:-1, 3] += extrapolation
        table[1:-1, 4] = -extrapolation


def advance(
    x: Tensor, prediction: Tensor, x0_previous: Tensor, noise: Tensor, coefficients: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Latents after one denoising step, and the clean latents predicted in it, both [B, C, h, w].

    x: float32 latents [B, C, h, w]; prediction: the network's output for them; x0_previous: the clean latents of the
    step before; noise: standard normal. A tensor must be finite even if its coefficient is 0, since 0 times NaN is NaN:
    give zeros. coefficients: the row of each image's `StepTable`, float32 [B, 6] on the device of `x`; clip: that of
    the tables.

    All operations are elementwise: images do not depend on each other, and a CUDA graph can hold the step.
    """
    c = coefficients[:, :, None, None, None].unbind(1)
    x0 = (c[0] * x + c[1] * prediction).clamp(-clip, clip)
    return c[2] * x + c[3] * x0 + c[4] * x0_previous + c[5] * noise, x0


class SchedulerRun:
    """One image's run through any diffusers scheduler that fits the model's diffusion.

    For each index i of `timesteps`: give the network `scale(x, i)` and `timesteps[i]`, and pass its prediction to
    `step`. x starts as standard normal noise times `init_noise_sigma`. The scheduler is copied, so one can serve many
    images at a time. Schedulers that evaluate the network twice per step, such as Heun's, have more timesteps than
    num_steps.
    """

    timesteps: tuple[float, ...]
    """The network's input t of each evaluation; not always whole numbers, and some come twice."""
    init_noise_sigma: float

    def __init__(self, scheduler: Any, diffusion: Diffusion, num_steps: int, clip: float) -> None:
        """clip: predicted clean latents are kept within [-clip, clip], as in a `StepTable`.

        Raises ValueError for an object that is not a scheduler, a scheduler with another noise schedule, prediction
        type or kind of diffusion, one that clips more narrowly, and a num_steps that it cannot do.
        """
        _check_scheduler(scheduler, diffusion, clip)
        _check_num_steps(num_steps, diffusion.config.num_train_timesteps)
        self._scheduler: Any = copy.deepcopy(scheduler)
        try:
            self._scheduler.set_timesteps(num_steps)
        except (ValueError, IndexError, ZeroDivisionError, AssertionError) as error:
            raise ValueError(
                f"num_steps must be one that {_name(scheduler)} can do, got {num_steps} ({error}); try another one"
            ) from error
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(0)
        self.timesteps = tuple(self._scheduler.timesteps.tolist())
        if not all(map(math.isfinite, self.timesteps)):
            raise ValueError(f"num_steps must be one that {_name(scheduler)} can do, got {num_steps}; try another one")
        if self.timesteps[0] < self.timesteps[-1]:
            raise ValueError(
                f"sampler must go from noise to clean latents, got {_name(scheduler)}, which goes the other way"
            )
        self.init_noise_sigma = float(self._scheduler.init_noise_sigma)
        self._takes_generator = "generator" in inspect.signature(self._scheduler.step).parameters
        self._is_epsilon = diffusion.config.prediction_type == "epsilon"
        self._clip = clip
        self._signals = _signals(diffusion, self.timesteps)

    def scale(self, x: Tensor, i: int) -> Tensor:
        """The network's input for latents `x` [C, h, w] at `timesteps[i]`."""
        return self._scheduler.scale_model_input(x[None], self._scheduler.timesteps[i])[0]

    def step(self, prediction: Tensor, i: int, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [C, h, w] for `timesteps[i + 1]`, or the finished ones, and the clean latents predicted at i.

        prediction: the network's output for `scale(x, i)`. To be called once for each i, in order.
        """
        alpha, sigma = self._signals[i]
        scaled = self.scale(x, i)
        unclipped = (scaled - sigma * prediction) / alpha if self._is_epsilon else alpha * scaled - sigma * prediction
        x0 = unclipped.clamp(-self._clip, self._clip)
        # The scheduler gets the prediction that corresponds to the clipped latents. Without clipping it is unchanged,
        # to the bit
        prediction = prediction + (unclipped - x0) * ((alpha if self._is_epsilon else 1.0) / sigma)
        if getattr(self._scheduler, "noise_sampler_seed", 0) is None:  # it would otherwise take a seed from the clock
            self._scheduler.noise_sampler_seed = int(torch.randint(2**31, (), generator=generator))
        random = {"generator": generator} if self._takes_generator else {}
        timestep = self._scheduler.timesteps[i]
        following = self._scheduler.step(prediction[None], timestep, x[None], return_dict=False, **random)[0]
        return following[0], x0


def _check_scheduler(scheduler: Any, diffusion: Diffusion, clip: float) -> None:
    """Raise ValueError unless `scheduler` is a diffusers scheduler for this diffusion."""
    if not isinstance(scheduler, SchedulerMixin):
        hint = "; give an instance of it" if isinstance(scheduler, type) else ""
        raise ValueError(f"{unknown_sampler(scheduler)}{hint}")
    given: Any = scheduler
    name, config, settings = _name(given), diffusion.config, given.config
    remedy = f"build it with {name}.from_config(lmfusion.model.diffusion.scheduler_config(model.config.diffusion))"
    theirs = getattr(given, "alphas_cumprod", None)
    if theirs is None or not _takes_plain_steps(given):
        raise ValueError(
            f"sampler must be a scheduler like DDIMScheduler or EulerDiscreteScheduler, got {name}, which is for "
            "another kind of diffusion"
        )
    if settings.get("prediction_type", "epsilon") != config.prediction_type:
        raise ValueError(
            f"prediction_type of the scheduler must be {config.prediction_type!r}, as the model's, got "
            f"{settings.get('prediction_type')!r} of {name}; {remedy}"
        )
    ours = diffusion.alphas_cumprod
    fits = theirs.shape == ours.shape and torch.allclose(theirs.to(ours), ours, rtol=1e-3, atol=1e-9)
    if not fits or settings.get("use_flow_sigmas", False):
        raise ValueError(
            f"the noise schedule of the scheduler must be the model's ({config.schedule!r}, {len(ours)} timesteps), "
            f"got that of {name} ({settings.get('beta_schedule')!r}, {len(theirs)} timesteps); {remedy}"
        )
    if settings.get("clip_sample", False) and settings.get("clip_sample_range", 1.0) < clip:
        raise ValueError(
            f"the scheduler must not clip latents below {clip}, which the model's reach, got {name} with "
            f"{settings.get('clip_sample_range', 1.0)}; {remedy}"
        )


def _takes_plain_steps(scheduler: Any) -> bool:
    """Whether a step needs a prediction, a timestep and a sample, and nothing else."""
    if not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        return False
    parameters = inspect.signature(scheduler.step).parameters
    num_required = sum(parameter.default is inspect.Parameter.empty for parameter in parameters.values())
    return num_required == 3 and "prev_timestep" not in parameters


def _signals(diffusion: Diffusion, timesteps: tuple[float, ...]) -> list[tuple[float, float]]:
    """(alpha, sigma) at each timestep; between whole ones log(sigma / alpha) is linear, as diffusers has it."""
    squared_alphas = diffusion.alphas_cumprod.numpy()
    log_sigmas = 0.5 * np.log((1 - squared_alphas) / squared_alphas)
    logs = np.interp(timesteps, np.arange(len(log_sigmas)), log_sigmas)
    alphas = [1 / math.sqrt(1 + math.exp(2 * log)) for log in logs]
    return [(alpha, alpha * math.exp(log)) for alpha, log in zip(alphas, logs, strict=True)]


def _check_num_steps(num_steps: int, num_train_timesteps: int) -> None:
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"num_steps must be between 1 and the diffusion's {num_train_timesteps}, got {num_steps}")


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__

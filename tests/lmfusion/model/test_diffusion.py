"""The diffusion process in training: the noise that is added, and the target."""

import pytest
import torch
from diffusers import DDPMScheduler

from lmfusion.model.diffusion import PREDICTION_TYPES, Diffusion, DiffusionConfig


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_each_image_has_its_own_timestep(prediction_type):
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type))
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=generator)
    timesteps = torch.tensor([0, 500, 999])
    noisy, target = diffusion.add_noise(x0, noise, timesteps), diffusion.target(x0, noise, timesteps)
    alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    for i, t in enumerate(timesteps):
        alpha, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        torch.testing.assert_close(noisy[i], alpha * x0[i] + sigma * noise[i])
        expected = noise[i] if prediction_type == "epsilon" else alpha * noise[i] - sigma * x0[i]
        torch.testing.assert_close(target[i], expected)


def test_loss_is_one_mean_an_image_in_float32():
    diffusion = Diffusion(DiffusionConfig())
    prediction, target = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16), torch.ones(2, 1, 2, 2, dtype=torch.bfloat16)
    target[1] *= 3
    loss = diffusion.loss(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [1.0, 9.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "x0"}, "prediction_type must be .* got 'x0'"),
        ({"schedule": "sigmoid"}, "schedule must be .* got 'sigmoid'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be from 2 .* got 0"),
        ({"loss_weight": float("nan")}, "loss_weight must be .* got nan"),
        ({"loss_weight": -1.0}, "loss_weight must be .* got -1.0"),
        ({"image_first_max_timestep": 1000}, "image_first_max_timestep must be from 0 to 999, got 1000"),
        ({"image_first_max_timestep": -1}, "image_first_max_timestep must be .* got -1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)

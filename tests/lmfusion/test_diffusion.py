"""The diffusion process: training targets, and samplers that undo the noise."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from lmfusion.diffusion import PREDICTION_TYPES, SAMPLERS, Diffusion, DiffusionConfig


def oracle(diffusion, latents, x0, timestep):
    """What a perfect network would say about `latents` if the data were the single point x0."""
    timesteps = torch.full((latents.shape[0],), timestep)
    signal = diffusion.add_noise(x0, torch.zeros_like(x0), timesteps)
    scale = diffusion.add_noise(torch.zeros_like(x0), torch.ones_like(x0), timesteps)
    return diffusion.target(x0, (latents - signal) / scale, timesteps)


@pytest.mark.parametrize("sampler_name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["cosine", "linear", "scaled_linear"])
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_sampler_returns_the_data_of_an_oracle(sampler_name, prediction_type, schedule, num_steps):
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type, schedule=schedule))
    x0 = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 1.8 - 0.9
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    latents = torch.stack([torch.randn(1, 4, 4, generator=g) for g in generators])
    sampler = diffusion.sampler(sampler_name, num_steps, clip_range=1.0)
    assert len(sampler.timesteps) == num_steps and sampler.timesteps[0] == 999
    for t in sampler.timesteps:
        latents = sampler.step(oracle(diffusion, latents, x0, t), t, latents, generators)
    # one epsilon step from pure noise divides rounding errors by alpha = 5e-5 (cosine); nothing can read x0 off that
    unreadable = prediction_type == "epsilon" and num_steps == 1
    torch.testing.assert_close(latents, x0, atol=2.0 if unreadable else 1e-2, rtol=0)


@pytest.mark.parametrize("sampler_name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [48, 100])
def test_sampler_keeps_the_spread_of_a_gaussian(sampler_name, num_steps):
    """With data from N(0, 0.5 ** 2) the optimal prediction is known; sampling with it must give that spread back."""
    diffusion = Diffusion(DiffusionConfig(prediction_type="v_prediction"))
    alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    std = 0.5
    generators = [torch.Generator().manual_seed(3)]
    latents = torch.randn(1, 1, 128, 128, generator=generators[0])
    sampler = diffusion.sampler(sampler_name, num_steps, clip_range=5.0)
    for t in sampler.timesteps:
        alpha, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        variance = alpha**2 * std**2 + sigma**2
        best_x0, best_noise = alpha * std**2 / variance * latents, sigma / variance * latents
        latents = sampler.step(alpha * best_noise - sigma * best_x0, t, latents, generators)
    assert latents.std().item() == pytest.approx(std, rel=0.07)


def test_ddim_is_diffusers_ddim_where_steps_divide():
    diffusion = Diffusion(DiffusionConfig())
    theirs = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=True, clip_sample_range=2.0
    )
    theirs.set_timesteps(20)
    sampler = diffusion.sampler("ddim", 20, clip_range=2.0)
    assert sampler.timesteps == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    ours = expected = torch.randn(1, 2, 4, 4, generator=generator)
    for t in sampler.timesteps:
        prediction = torch.randn(1, 2, 4, 4, generator=generator)
        ours = sampler.step(prediction, t, ours, [generator])
        expected = theirs.step(prediction, t, expected, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler_name", SAMPLERS)
def test_few_epsilon_steps_with_a_rough_network_stay_in_range(sampler_name):
    diffusion = Diffusion(DiffusionConfig(prediction_type="epsilon"))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 1, 8, 8, generator=generator)
    sampler = diffusion.sampler(sampler_name, 10, clip_range=1.0)
    for t in sampler.timesteps:
        rough = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        latents = sampler.step(rough, t, latents, [generator])
        assert latents.abs().max() < 10


def test_noise_of_an_image_comes_from_its_own_generator():
    diffusion = Diffusion(DiffusionConfig())
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def step(indices):
        generators = [torch.Generator().manual_seed(i) for i in indices]
        sampler = diffusion.sampler("ddpm", 10, clip_range=1.0)
        return sampler.step(x[indices], sampler.timesteps[0], x[indices], generators)

    torch.testing.assert_close(step([0, 1, 2])[1:2], step([1]), atol=0, rtol=0)


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
        ({"prediction_type": "x0"}, "prediction_type 'x0'"),
        ({"schedule": "sigmoid"}, "schedule 'sigmoid'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"loss_weight": float("nan")}, "loss_weight is nan"),
        ({"loss_weight": -1.0}, "loss_weight is -1.0"),
        ({"image_first_max_timestep": 1000}, "image_first_max_timestep is 1000"),
        ({"image_first_max_timestep": -1}, "image_first_max_timestep is -1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)


@pytest.mark.parametrize(
    ("name", "num_steps", "message"), [("euler", 10, "euler"), ("ddpm", 0, "is 0"), ("ddim", 1001, "1001")]
)
def test_wrong_sampler_or_steps_are_named(name, num_steps, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(DiffusionConfig()).sampler(name, num_steps, clip_range=1.0)

"""Samplers: the tables do what diffusers' schedulers do, for each image separately; schedulers that fit are taken."""

import functools

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from lmfusion.generation.samplers import SAMPLERS, SchedulerRun, advance, step_table
from lmfusion.model.diffusion import PREDICTION_TYPES, Diffusion, DiffusionConfig, scheduler_config

# diffusers calls numpy's functions on tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

SCHEDULES = ("cosine", "linear", "scaled_linear")


class ClippedDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ that clips predicted clean latents to a fixed range; diffusers' would divide by the range too."""

    def _threshold_sample(self, sample):
        return sample.clamp(-self.config.sample_max_value, self.config.sample_max_value)


def diffusers_scheduler(diffusion, name, timesteps, clip):
    """The diffusers scheduler of our sampler, at our timesteps."""
    settings = scheduler_config(diffusion.config)
    if name == "ddpm":
        scheduler = DDPMScheduler.from_config({**settings, "clip_sample": True, "clip_sample_range": clip})
    else:
        settings = {**settings, "thresholding": True, "sample_max_value": clip}
        scheduler = ClippedDPMSolver.from_config(settings, solver_order=1 if name == "ddim" else 2)
    scheduler.set_timesteps(timesteps=list(timesteps))
    return scheduler


def run(table, latents, predict, generator, dtype=torch.float32):
    """A whole run for latents [B, C, h, w], all at the same step; returns the latents after each."""
    x, x0, after = latents.to(dtype), torch.zeros_like(latents, dtype=dtype), []
    for i, timestep in enumerate(table.timesteps):
        noise = torch.randn(x.shape, generator=generator, dtype=dtype)
        coefficients = table.coefficients[i].expand(len(x), -1)
        x, x0 = advance(x, predict(x, timestep), x0, noise, coefficients, table.clip)
        after.append(x)
    return after


def signals(diffusion, timestep):
    """alpha and sigma at a timestep, whole or not: log(sigma / alpha) is linear in between."""
    squared = diffusion.alphas_cumprod
    low = min(int(timestep), len(squared) - 2)
    logs = (0.5 * torch.log((1 - squared) / squared))[low : low + 2]
    ratio = torch.exp(logs[0] + (timestep - low) * (logs[1] - logs[0]))
    alpha = 1 / (1 + ratio**2).sqrt()
    return alpha.item(), (alpha * ratio).item()


def gaussian_oracle(diffusion, mean, std):
    """The best possible prediction if every value of the data comes from N(mean, std ** 2)."""

    def predict(x, timestep):
        alpha, sigma = signals(diffusion, timestep)
        x0 = mean + alpha * std**2 * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        noise = (x - alpha * x0) / sigma
        return noise if diffusion.config.prediction_type == "epsilon" else alpha * noise - sigma * x0

    return predict


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 50, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_whole_runs_are_those_of_diffusers(name, prediction_type, schedule, num_steps):
    """A rough network, so that about half of the predicted clean latents have to be clipped."""
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type, schedule=schedule))
    table = step_table(diffusion, name, num_steps, clip=0.7)
    assert len(table.timesteps) == num_steps and table.timesteps[0] == 999
    scheduler = diffusers_scheduler(diffusion, name, table.timesteps, clip=0.7)
    # diffusers takes 1 - (almost 1) in float32 in every step, which leaves errors that add up over 1,000
    tolerance = 1e-4 if num_steps < 1000 else 1e-3
    dtype = torch.float32 if num_steps in (1, 7, 50) else torch.float64
    draw, ours_noise, their_noise = (torch.Generator().manual_seed(seed) for seed in (0, 1, 1))
    ours = theirs = torch.randn(2, 1, 4, 4, generator=draw).to(dtype)
    x0, found, expected = torch.zeros_like(ours), [], []
    for i, timestep in enumerate(table.timesteps):
        prediction = torch.randn(ours.shape, generator=draw).to(dtype)
        noise = torch.randn(ours.shape, generator=ours_noise, dtype=dtype)
        ours, x0 = advance(ours, prediction, x0, noise, table.coefficients[i].expand(2, -1), table.clip)
        chance = {"generator": their_noise} if name == "ddpm" else {}
        theirs = scheduler.step(prediction, timestep, theirs, return_dict=False, **chance)[0]
        found += [ours]
        expected += [theirs]
        assert x0.abs().max() <= 0.7
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_steps", [1, 3, 7, 30, 999])
def test_timesteps_are_trailing_as_in_diffusers(num_steps):
    diffusion = Diffusion(DiffusionConfig())
    theirs = EulerDiscreteScheduler.from_config(scheduler_config(diffusion.config))
    theirs.set_timesteps(num_steps)
    for name in SAMPLERS:
        assert list(step_table(diffusion, name, num_steps, clip=1.0).timesteps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_coefficients_are_exact_to_float32(name, schedule):
    """In float64 throughout, diffusers' formulas for one step in the middle give the table's numbers, rounded once."""
    diffusion = Diffusion(DiffusionConfig(schedule=schedule))
    table = step_table(diffusion, name, 20, clip=1e9)
    scheduler = diffusers_scheduler(diffusion, name, table.timesteps, clip=1e9)
    x, prediction, x0_previous = torch.randn(3, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    if name == "ddpm":
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    else:
        squared = diffusion.alphas_cumprod[torch.tensor([*table.timesteps])]
        scheduler.sigmas = torch.cat([((1 - squared) / squared).sqrt(), torch.zeros(1, dtype=torch.float64)])
    if name == "dpm-solver":
        scheduler.model_outputs, scheduler.lower_order_nums = [None, x0_previous], 1
    zeros, generator = torch.zeros_like(x), torch.Generator().manual_seed(1)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    chance = {"generator": torch.Generator().manual_seed(1)} if name == "ddpm" else {}
    if name != "ddpm":  # it rounds its sample to float32; this one survives that
        x = x.float().double()
    expected = scheduler.step(prediction, table.timesteps[9], x, return_dict=False, **chance)[0]
    previous = x0_previous if name == "dpm-solver" else zeros
    ours, _ = advance(x, prediction, previous, noise, table.coefficients[9:10], table.clip)
    torch.testing.assert_close(ours, expected, atol=3e-7, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_the_data_of_an_oracle_comes_back(name, prediction_type, schedule, num_steps):
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type, schedule=schedule))
    generator = torch.Generator().manual_seed(1)
    data = torch.rand(2, 1, 4, 4, generator=generator) * 1.8 - 0.9
    latents = torch.randn(data.shape, generator=generator)
    table = step_table(diffusion, name, num_steps, clip=1.0)
    last = run(table, latents, gaussian_oracle(diffusion, data, std=0.0), generator)[-1]
    # one epsilon step from pure noise divides rounding errors by alpha = 5e-5 (cosine); nothing can read data off that
    unreadable = prediction_type == "epsilon" and num_steps == 1
    torch.testing.assert_close(last, data, atol=2.0 if unreadable else 1e-2, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [48, 100])
def test_the_spread_of_a_gaussian_is_kept(name, num_steps):
    diffusion = Diffusion(DiffusionConfig(prediction_type="v_prediction"))
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 1, 128, 128, generator=generator)
    table = step_table(diffusion, name, num_steps, clip=5.0)
    last = run(table, latents, gaussian_oracle(diffusion, mean=0.2, std=0.5), generator)[-1]
    assert last.mean().item() == pytest.approx(0.2, abs=0.01)
    assert last.std().item() == pytest.approx(0.5, rel=0.07)


def test_ddim_is_diffusers_ddim_where_steps_divide():
    diffusion = Diffusion(DiffusionConfig())
    theirs = DDIMScheduler.from_config(
        {**scheduler_config(diffusion.config), "clip_sample": True, "clip_sample_range": 2.0}
    )
    theirs.set_timesteps(20)
    table = step_table(diffusion, "ddim", 20, clip=2.0)
    assert list(table.timesteps) == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(1, 2, 4, 4, generator=generator)
    predictions = {t: torch.randn(1, 2, 4, 4, generator=generator) for t in table.timesteps}
    ours = run(table, expected, lambda x, t: predictions[t], generator)
    for i, t in enumerate(table.timesteps):
        expected = theirs.step(predictions[t], t, expected, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(ours[i], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_few_epsilon_steps_with_a_rough_network_stay_in_range(name):
    diffusion = Diffusion(DiffusionConfig(prediction_type="epsilon"))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 1, 8, 8, generator=generator)

    def rough(x, timestep):
        return x + 0.1 * torch.randn(x.shape, generator=generator)

    for x in run(step_table(diffusion, name, 10, clip=1.0), latents, rough, generator):
        assert x.abs().max() < 10


def test_images_at_other_steps_of_other_samplers_do_not_touch_each_other():
    diffusion = Diffusion(DiffusionConfig(prediction_type="v_prediction"))
    tables = [step_table(diffusion, name, 5 + 3 * i, clip=0.5) for i, name in enumerate(SAMPLERS)]
    rows = torch.stack([table.coefficients[i + 1] for i, table in enumerate(tables)])
    x, prediction, x0_previous, noise = torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    together = advance(x, prediction, x0_previous, noise, rows, 0.5)
    for i in range(3):
        one = slice(i, i + 1)
        alone = advance(x[one], prediction[one], x0_previous[one], noise[one], rows[one], 0.5)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[one], b)


def test_only_what_a_sampler_needs_has_a_weight():
    diffusion = Diffusion(DiffusionConfig())
    for name in SAMPLERS:
        table = step_table(diffusion, name, 6, clip=1.0)
        assert table.coefficients.dtype == torch.float32 and table.coefficients.shape == (6, 6)
        has_previous, has_noise = (table.coefficients[:, column] != 0 for column in (4, 5))
        middle = torch.tensor([False, True, True, True, True, False])
        assert torch.equal(has_previous, middle if name == "dpm-solver" else torch.zeros(6, dtype=torch.bool))
        assert has_noise.tolist() == ([True] * 5 + [False] if name == "ddpm" else [False] * 6)
        assert table.coefficients[-1, 2:].tolist() == [0, 1, 0, 0]  # ends at the predicted clean latents


def test_bfloat16_predictions_are_taken_in_float32():
    table = step_table(Diffusion(DiffusionConfig()), "ddim", 4, clip=1.0)
    x, prediction = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    zeros, prediction = torch.zeros_like(x), prediction.bfloat16()
    ours = advance(x, prediction, zeros, zeros, table.coefficients[1:2], 1.0)
    expected = advance(x, prediction.float(), zeros, zeros, table.coefficients[1:2], 1.0)
    assert ours[0].dtype == torch.float32 and torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize(
    ("name", "num_steps", "message"), [("euler", 10, "'euler'"), ("ddpm", 0, "got 0"), ("ddim", 1001, "1001")]
)
def test_wrong_sampler_or_steps_are_named(name, num_steps, message):
    with pytest.raises(ValueError, match=message):
        step_table(Diffusion(DiffusionConfig()), name, num_steps, clip=1.0)


# The evaluations that 40 steps take, and whether the scheduler takes random numbers
SCHEDULERS = {
    "DDIMScheduler": (40, False),
    "DDPMScheduler": (40, True),
    "DEISMultistepScheduler": (40, False),
    "DPMSolverMultistepScheduler": (40, False),
    "DPMSolverSinglestepScheduler": (40, False),
    "EulerAncestralDiscreteScheduler": (40, True),
    "EulerDiscreteScheduler": (40, False),
    "HeunDiscreteScheduler": (79, False),
    "KDPM2AncestralDiscreteScheduler": (79, True),
    "KDPM2DiscreteScheduler": (79, False),
    "LMSDiscreteScheduler": (40, False),
    "PNDMScheduler": (41, False),
    "SASolverScheduler": (40, True),
    "UniPCMultistepScheduler": (40, False),
}


def run_scheduler(scheduler, diffusion, num_steps, predict, seed=0, size=64, clip=5.0):
    """A whole run for one image; returns the finished latents and the clean ones predicted in the last step."""
    if isinstance(scheduler, str):
        scheduler = getattr(diffusers, scheduler).from_config(scheduler_config(diffusion.config))
    its_run, generator = SchedulerRun(scheduler, diffusion, num_steps, clip), torch.Generator().manual_seed(seed)
    x = torch.randn(1, size, size, generator=torch.Generator().manual_seed(9)) * its_run.init_noise_sigma
    for i, timestep in enumerate(its_run.timesteps):
        x, x0 = its_run.step(predict(its_run.scale(x, i), timestep), i, x, generator)
    return x, x0, its_run


@functools.cache
def worst_of_ours(prediction_type, schedule):
    """The error of our own samplers in the spread of known data after 40 steps."""
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type, schedule=schedule))
    predict, generator = gaussian_oracle(diffusion, mean=0.3, std=0.4), torch.Generator().manual_seed(0)
    latents = torch.randn(1, 1, 64, 64, generator=generator)
    ours = [run(step_table(diffusion, name, 40, clip=5.0), latents, predict, generator)[-1] for name in SAMPLERS]
    return max(abs(x.std().item() - 0.4) for x in ours)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("prediction_type", "schedule"), [("epsilon", "cosine"), ("v_prediction", "scaled_linear")])
def test_any_scheduler_lands_on_the_data(name, prediction_type, schedule):
    """Known data: mean and spread come out as well as by our own samplers in as many steps."""
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type, schedule=schedule))
    predict = gaussian_oracle(diffusion, mean=0.3, std=0.4)
    worst = worst_of_ours(prediction_type, schedule)
    assert worst < 0.06  # few steps make data narrower
    x, x0, its_run = run_scheduler(name, diffusion, 40, predict)
    assert len(its_run.timesteps) == SCHEDULERS[name][0]
    for result in (x, x0):
        assert result.mean().item() == pytest.approx(0.3, abs=0.03)
        assert result.std().item() == pytest.approx(0.4, abs=worst + 0.01)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_random_numbers_of_a_scheduler_come_from_the_generator(name):
    diffusion = Diffusion(DiffusionConfig(schedule="scaled_linear"))
    predict = gaussian_oracle(diffusion, mean=0.3, std=0.4)
    one, same, other = (run_scheduler(name, diffusion, 10, predict, seed, size=8)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert torch.equal(one, other) != SCHEDULERS[name][1]


class SeededScheduler(EulerDiscreteScheduler):
    """Takes no generator, but a seed, or a seed from the clock if there is none, as DPMSolverSDEScheduler does."""

    noise_sampler_seed = None

    def step(self, model_output, timestep, sample, return_dict=True):
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(self.noise_sampler_seed))
        return (super().step(model_output, timestep, sample).prev_sample + 0.1 * noise,)


def test_random_numbers_of_a_scheduler_with_a_seed_come_from_the_generator():
    diffusion = Diffusion(DiffusionConfig())
    scheduler = SeededScheduler.from_config(scheduler_config(diffusion.config))
    predict = gaussian_oracle(diffusion, mean=0.3, std=0.4)
    one, same, other = (run_scheduler(scheduler, diffusion, 5, predict, seed, size=8)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert scheduler.noise_sampler_seed is None


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("name", "twin"), [("ddim", "EulerDiscreteScheduler"), ("dpm-solver", "DPMSolverMultistepScheduler")]
)
def test_schedulers_clip_as_our_samplers_do(name, twin, prediction_type):
    """Euler's method is DDIM in other variables, so a rough network must lead both to the same place."""
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type))
    right, table = gaussian_oracle(diffusion, mean=0.3, std=0.4), step_table(diffusion, name, 10, clip=0.6)
    draw = torch.Generator().manual_seed(0)
    errors = {timestep: 0.1 * torch.randn(1, 16, 16, generator=draw) for timestep in table.timesteps}

    def rough(x, timestep):
        return right(x, timestep) + errors[timestep]

    theirs, their_x0, its_run = run_scheduler(twin, diffusion, 10, rough, size=16, clip=0.6)
    latents = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(9))
    ours = run(table, latents, rough, torch.Generator())[-1]
    assert its_run.timesteps == table.timesteps
    assert (ours.abs() > 0.59).float().mean() > 0.1 and ours.abs().max() <= 0.6
    torch.testing.assert_close(theirs[None], ours, atol=5e-3, rtol=0)
    torch.testing.assert_close(their_x0[None], ours, atol=5e-3, rtol=0)


def test_a_scheduler_serves_many_images_at_a_time_and_stays_as_it_was():
    diffusion = Diffusion(DiffusionConfig())
    predict = gaussian_oracle(diffusion, mean=0.0, std=0.5)
    scheduler = diffusers.UniPCMultistepScheduler.from_config(scheduler_config(diffusion.config))
    before = scheduler.timesteps.clone()
    alone = [run_scheduler(scheduler, diffusion, num_steps, predict, size=4)[0] for num_steps in (5, 8)]
    runs = [SchedulerRun(scheduler, diffusion, num_steps, 5.0) for num_steps in (5, 8)]
    x = [torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(9)) for _ in runs]
    for i in range(8):
        for j, its_run in enumerate(runs):
            if i < len(its_run.timesteps):
                prediction = predict(its_run.scale(x[j], i), its_run.timesteps[i])
                x[j], _ = its_run.step(prediction, i, x[j], torch.Generator())
    assert torch.equal(x[0], alone[0]) and torch.equal(x[1], alone[1])
    assert torch.equal(scheduler.timesteps, before)


def test_timesteps_between_whole_ones_reach_the_network():
    diffusion = Diffusion(DiffusionConfig(schedule="scaled_linear"))
    settings = {**scheduler_config(diffusion.config), "use_karras_sigmas": True}
    predict = gaussian_oracle(diffusion, mean=0.3, std=0.4)
    x, _, its_run = run_scheduler(EulerDiscreteScheduler.from_config(settings), diffusion, 40, predict)
    assert any(timestep != int(timestep) for timestep in its_run.timesteps)
    assert x.mean().item() == pytest.approx(0.3, abs=0.03) and x.std().item() == pytest.approx(0.4, abs=0.05)


def fitting(name, **settings):
    return getattr(diffusers, name).from_config({**scheduler_config(DiffusionConfig()), **settings})


@pytest.mark.parametrize(
    ("make", "num_steps", "message"),
    [
        (lambda: "euler", 4, "sampler must be one of ddpm, .*, got 'euler'"),
        (lambda: EulerDiscreteScheduler, 4, "give an instance"),
        (
            lambda: fitting("EulerDiscreteScheduler", prediction_type="v_prediction"),
            4,
            "must be 'epsilon', as the model's, got 'v_prediction'",
        ),
        (
            EulerDiscreteScheduler,
            4,
            r"noise schedule .*\('cosine'.*\('linear'.*EulerDiscreteScheduler.from_config\(lmf",
        ),
        (lambda: fitting("DDIMScheduler", num_train_timesteps=500), 4, "1000 timesteps.*500 timesteps"),
        (lambda: fitting("DDIMScheduler", rescale_betas_zero_snr=True), 4, "noise schedule"),
        (lambda: fitting("DPMSolverMultistepScheduler", use_flow_sigmas=True), 4, "noise schedule"),
        (lambda: fitting("DDIMScheduler", clip_sample=True), 4, "must not clip latents below 5.0, .* with 1.0"),
        (lambda: fitting("DDIMInverseScheduler"), 4, "must go from noise to clean latents, got DDIMInverseScheduler"),
        (diffusers.FlowMatchEulerDiscreteScheduler, 4, "another kind of diffusion"),
        (lambda: fitting("UnCLIPScheduler"), 4, "another kind of diffusion"),
        (lambda: fitting("RePaintScheduler"), 4, "another kind of diffusion"),
        (diffusers.ScoreSdeVeScheduler, 4, "another kind of diffusion"),
        (lambda: fitting("DDIMScheduler"), 0, "num_steps must be between 1 and the diffusion's 1000, got 0"),
        (lambda: fitting("DDIMScheduler"), 1001, "between 1 and the diffusion's 1000, got 1001"),
        (lambda: fitting("LCMScheduler"), 400, "num_steps must be one that LCMScheduler can do, got 400"),
        (
            lambda: fitting("KDPM2AncestralDiscreteScheduler"),
            2,
            "num_steps must be one that KDPM2AncestralDiscreteScheduler can do, got 2",
        ),
    ],
)
def test_a_scheduler_that_does_not_fit_is_named(make, num_steps, message):
    with pytest.raises(ValueError, match=message):
        SchedulerRun(make(), Diffusion(DiffusionConfig()), num_steps, clip=5.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_scheduler_config_makes_schedulers_of_the_same_process(prediction_type, schedule):
    config = DiffusionConfig(prediction_type=prediction_type, schedule=schedule, num_train_timesteps=800)
    scheduler = EulerDiscreteScheduler.from_config(scheduler_config(config))
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), Diffusion(config).alphas_cumprod)
    assert scheduler.config.prediction_type == prediction_type and scheduler.config.timestep_spacing == "trailing"

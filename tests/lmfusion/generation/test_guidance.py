"""Guidance: branches in one forward equal separate forwards, combined by the papers' formulas, with any sampler."""

import diffusers
import numpy as np
import pytest
import torch

from lmfusion.generation import Engine, GenerationOptions, encode_prompt
from lmfusion.generation.cache import KeyValueCache
from lmfusion.generation.decoding import random_generator
from lmfusion.generation.device_steps import Branching, predict_step
from lmfusion.generation.guidance import ContextImage, guidance_of, guide
from lmfusion.generation.samplers import step_table
from lmfusion.images.preprocessing import to_pil
from lmfusion.model.batch import encode_caption
from lmfusion.model.diffusion import scheduler_config
from tests.lmfusion.generation import reference
from tests.lmfusion.generation.models import UNET, build, tokens_of

SHAPE, NUM_IMAGE_TOKENS = (1, 8, 8), 16
EDIT = ["make", np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8), "rounder"]

# diffusers calls numpy's functions on tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return build(tiny_llama)


def contexts(model, prompt, negative_prompt=None):
    """The documents of the three branches before the image: everything, the images, nothing."""
    tokens, read = tokens_of(model), encode_prompt(model, prompt)
    negative_ids = encode_caption(model.tokenizer, negative_prompt) if negative_prompt else []
    latents = tuple(model.codec.encode(image[None])[0] for image in read.images)
    everything = reference.Context(read.document(model.tokens_per_image, tokens), latents)
    images = nothing = reference.Context().text(tokens.bos)
    for item in latents:
        images = images.marker(tokens.boi_token_id).image(item, NUM_IMAGE_TOKENS).marker(tokens.eoi_token_id)
    return [c.marker(tokens.boi_token_id) for c in (everything, images.text(negative_ids), nothing.text(negative_ids))]


def predict_apart(model, context, x, timestep):
    """The prediction at the end of one branch, with the whole document in a separate forward."""
    return reference.read(model, context.image(x, NUM_IMAGE_TOKENS), timestep)[1]


@torch.no_grad()
def predict_together(model, all_contexts, x, timesteps, index, weights, rescale):
    """Guided predictions for images x [R, C, h, w], all branches in one forward over the cache."""
    cache = KeyValueCache(model, 1000)
    documents = cache.allocate([context.document.num_tokens + NUM_IMAGE_TOKENS for context, _ in all_contexts])
    layout = cache.layout(documents, [context.document.spans for context, _ in all_contexts])
    latents = [item for context, _ in all_contexts for item in context.latents]
    rows = torch.empty(0, model.config.image_hidden_size, dtype=x.dtype)
    if latents:
        rows, _ = model.encode_images(torch.stack(latents), torch.zeros(len(latents), dtype=torch.int64))
    token_ids = [token_id for context, _ in all_contexts for token_id in context.document.token_ids]
    model.run_layers(model.embed(torch.tensor(token_ids)), rows, layout, cache.layers)
    for document, (context, _) in zip(documents, all_contexts, strict=True):
        document.length = context.document.num_tokens
    layout = cache.layout(documents, [[("image", NUM_IMAGE_TOKENS)]] * len(documents))
    branching = Branching(
        torch.tensor([image for _, image in all_contexts]),
        torch.tensor(index),
        torch.tensor(weights, dtype=x.dtype),
        torch.tensor(rescale, dtype=x.dtype),
    )
    return predict_step(model, cache, x, torch.tensor(timesteps), layout, branching)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", ["linear", "unet"])
def test_one_forward_is_two_or_three(tiny_llama, kind, dtype, tolerance):
    """An image guided by text beside one guided by text and image, at other timesteps."""
    model = build(tiny_llama, dtype, **(UNET if kind == "unet" else {}))
    plain, edit = contexts(model, ["a seven"]), contexts(model, EDIT, negative_prompt="blur")
    plain, edit = (
        [reference.Context(c.document, tuple(item.to(dtype) for item in c.latents)) for c in several]
        for several in (plain, edit)
    )
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)
    branches = [(plain[0], 0), (plain[2], 0), (edit[0], 1), (edit[1], 1), (edit[2], 1)]
    found = predict_together(
        model, branches, x, [700, 300], [[0, 1, 0], [2, 3, 4]], [[2.5, -1.5, 0.0], [2.0, -0.7, -0.3]], [0.0, 0.0]
    )
    full, base = (predict_apart(model, context, x[0], 700) for context in (plain[0], plain[2]))
    assert (full - base).abs().max() > 0.01
    torch.testing.assert_close(found[0], base + 2.5 * (full - base), atol=tolerance, rtol=0)
    full, images, base = (predict_apart(model, context, x[1], 300) for context in edit)
    assert min((full - images).abs().max(), (images - base).abs().max()) > 0.01
    expected = base + 1.3 * (images - base) + 2.0 * (full - images)
    torch.testing.assert_close(found[1], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("scale", "image_scale", "has_images", "weight", "branches"),
    [
        (2.0, None, True, 2.0, [("nothing", -1.0)]),
        (2.0, 1.5, False, 2.0, [("nothing", -1.0)]),
        (2.0, 1.5, True, 2.0, [("images", -0.5), ("nothing", -0.5)]),
        (2.0, 1.0, True, 2.0, [("images", -1.0)]),
        (1.5, 1.5, True, 1.5, [("nothing", -0.5)]),
        (1.0, None, True, 1.0, []),
        (1.0, 1.0, True, 1.0, []),
        (1.0, 2.0, True, 1.0, [("images", 1.0), ("nothing", -1.0)]),
    ],
)
def test_branches_without_weight_are_left_out(model, scale, image_scale, has_images, weight, branches):
    options = GenerationOptions(max_images=1, guidance_scale=scale, image_guidance_scale=image_scale)
    images = [torch.zeros(SHAPE)] * 2 if has_images else []
    guidance = guidance_of(options, [ContextImage(x, NUM_IMAGE_TOKENS) for x in images], tokens_of(model), [7])
    assert guidance.weight == weight
    assert len(guidance.branches) == len(branches)
    for branch, (kind, expected) in zip(guidance.branches, branches, strict=True):
        num_images = 2 if kind == "images" else 0
        assert branch.weight == pytest.approx(expected)
        assert len(branch.images) == num_images
        assert (
            branch.document.num_tokens == 1 + num_images * (NUM_IMAGE_TOKENS + 2) + 1 + 1
        )  # bos, negative prompt, boi
    assert guidance.weight + sum(branch.weight for branch in guidance.branches) == pytest.approx(1.0)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_takes_contrast_back(rescale):
    """Lin et al. 2023, equations 15 and 16, for each image on its own; weights and branches of unlike images."""
    predictions = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = torch.tensor([[3, 0, 3], [4, 1, 2]])
    weights = torch.tensor([[7.5, -6.5, 0.0], [3.0, -1.0, -1.0]], dtype=torch.float64)
    found = guide(predictions, index, weights, torch.tensor([rescale, 0.5], dtype=torch.float64))
    for i, (full, others, share) in enumerate(
        [(predictions[3], -6.5 * predictions[0], rescale), (predictions[4], -predictions[1] - predictions[2], 0.5)]
    ):
        guided = weights[i, 0] * full + others
        rescaled = guided * full.std() / guided.std()
        torch.testing.assert_close(found[i], share * rescaled + (1 - share) * guided)
    if rescale == 1:
        torch.testing.assert_close(found[0].std(), predictions[3].std())


def test_rescale_of_a_flat_prediction_is_finite():
    flat = guide(torch.zeros(2, 1, 2, 2), torch.tensor([[0, 1, 0]]), torch.tensor([[2.0, -1.0, 0.0]]), torch.ones(1))
    assert torch.equal(flat, torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("interval", "num_guided"), [((0.0, 1.0), 5), ((0.3, 0.7), 2), ((0.799, 0.799), 1), ((0.81, 0.9), 0)]
)
def test_steps_outside_the_interval_cost_one_branch(model, monkeypatch, interval, num_guided):
    """Timesteps are 999, 799, 599, 399 and 199 of 1,000."""
    rows = []
    run_layers = type(model).run_layers

    def watch(self, x_text, x_image, *args, **kwargs):
        if not len(x_text):
            rows.append(len(x_image))
        return run_layers(self, x_text, x_image, *args, **kwargs)

    monkeypatch.setattr(type(model), "run_layers", watch)
    options = dict(num_steps=5, sampler="ddim", guidance_scale=3.0)
    image = model.draw(["a seven"], **options, guidance_interval=interval)[0]
    assert sorted(rows) == [NUM_IMAGE_TOKENS] * (5 - num_guided) + [2 * NUM_IMAGE_TOKENS] * num_guided
    if num_guided == 0:
        plain = model.draw(["a seven"], **{**options, "guidance_scale": 1.0})[0]
        np.testing.assert_array_equal(np.asarray(image), np.asarray(plain))


def test_a_negative_prompt_takes_the_place_of_no_text(model):
    options = dict(num_steps=3, sampler="ddim", guidance_scale=4.0)
    plain, empty, away, itself = (
        np.asarray(model.draw(["a seven"], **options, negative_prompt=negative)[0])
        for negative in (None, "", "grey and flat", "a seven")
    )
    np.testing.assert_array_equal(plain, empty)
    assert np.abs(plain.astype(int) - away).max() > 5
    # Both branches read the same, so their difference is nothing
    alone = np.asarray(model.draw(["a seven"], **{**options, "guidance_scale": 1.0})[0])
    assert np.abs(itself.astype(int) - alone).max() <= 1


def draw_apart(model, run, prompt, predict_from, scale, seed=0):
    """An image by `run`, a function of (x, predict, generator), with a separate forward for each branch."""
    generator = random_generator(seed, 0, 1)
    x = torch.randn(SHAPE, generator=generator)
    everything, _, nothing = contexts(model, prompt)

    def predict(x, timestep):
        full, base = (predict_from(model, context, x, timestep) for context in (everything, nothing))
        return base + scale * (full - base)

    return np.asarray(to_pil(model.codec.decode(run(x, predict, generator)[None]))[0]).astype(int)


@pytest.mark.parametrize("changed_at", [0, 2])
def test_denoising_continues_from_replaced_latents(model, changed_at):
    table = step_table(model.diffusion, "ddim", 4, clip=1.0)
    other = torch.linspace(-1, 1, 64).view(SHAPE)

    def run(x, predict, generator):
        for i, (timestep, (c0, c1, c2, c3, _, _)) in enumerate(
            zip(table.timesteps, table.coefficients.tolist(), strict=True)
        ):
            x0 = (c0 * x + c1 * predict(x, timestep)).clamp(-1, 1)
            x = other if i == changed_at else c2 * x + c3 * x0
        return x

    def replace(step, timestep, tensors):
        return {"latents": other} if step == changed_at else None

    expected = draw_apart(model, run, ["a seven"], predict_apart, scale=2.0)
    options = dict(num_steps=4, sampler="ddim", guidance_scale=2.0)
    found = np.asarray(model.draw(["a seven"], **options, callback_on_step_end=replace)[0]).astype(int)
    assert np.abs(found - expected).max() <= 1
    untouched = np.asarray(model.draw(["a seven"], **options)[0]).astype(int)
    assert np.abs(found - untouched).max() > 5


SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]


def scheduler_of(model, name):
    return getattr(diffusers, name).from_config(scheduler_config(model.config.diffusion))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_draws_as_in_a_loop_by_hand(model, name):
    """The loop of diffusers' pipelines, with the clipping that the schedulers do not have."""

    def run(x, predict, generator):
        scheduler = scheduler_of(model, name)
        scheduler.set_timesteps(6)
        x = x * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x[None], timestep)[0]
            # Clean latents that are clipped, and the v that stands for them
            squared = torch.as_tensor(alphas(float(timestep)), dtype=torch.float32)
            alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
            x0 = (alpha * scaled - sigma * predict(scaled, timestep.item())).clamp(-1, 1)
            v = (alpha * scaled - x0) / sigma
            takes_generator = name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler")
            chance = {"generator": generator} if takes_generator else {}
            x = scheduler.step(v[None], timestep, x[None], **chance).prev_sample[0]
        return x

    def alphas(timestep):
        squared = model.diffusion.alphas_cumprod.numpy()
        log = np.interp(timestep, np.arange(1000), np.log((1 - squared) / squared))
        return 1 / (1 + np.exp(log))

    expected = draw_apart(model, run, ["a seven"], predict_apart, scale=2.0)
    scheduler = scheduler_of(model, name)
    found = np.asarray(model.draw(["a seven"], num_steps=6, sampler=scheduler, guidance_scale=2.0)[0]).astype(int)
    assert found.std() > 10 and np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(("ours", "theirs"), [("ddim", "EulerDiscreteScheduler"), ("dpm-solver", SCHEDULERS[2])])
def test_schedulers_that_are_our_samplers_draw_the_same(model, ours, theirs):
    options = dict(num_steps=6, guidance_scale=2.0)
    one, other = (
        np.asarray(model.draw(["a seven"], sampler=sampler, **options)[0]).astype(int)
        for sampler in (ours, scheduler_of(model, theirs))
    )
    assert np.abs(one - other).max() <= 1


def test_schedulers_of_one_batch_keep_apart(model):
    samplers = ["ddpm", scheduler_of(model, "HeunDiscreteScheduler"), scheduler_of(model, "UniPCMultistepScheduler")]
    samplers += samplers[1:2]  # one instance for two requests
    engine, place, images = Engine(model, num_slots=1000), {}, {}
    prompt = encode_prompt(model, ["a seven"])
    every = dict(draw_first=True, max_images=1, max_new_tokens=0)
    for i, sampler in enumerate(samplers):
        options = GenerationOptions(**every, num_steps=4 + i % 3, sampler=sampler)
        place[engine.submit(prompt, options, index=0)] = i
    while engine.has_work:
        for request_id, event in engine.step():
            if hasattr(event, "settings"):
                images[place[request_id]] = np.asarray(event.image).astype(int)
    for i, sampler in enumerate(samplers):
        alone = np.asarray(model.draw(["a seven"], num_steps=4 + i % 3, sampler=sampler)[0]).astype(int)
        assert np.abs(images[i] - alone).max() <= 1


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (diffusers.EulerDiscreteScheduler(), "prediction_type .* must be 'v_prediction', .*, got 'epsilon'"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "another kind of diffusion"),
        (7, "sampler must be one of ddpm.*, got 7"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused_at_once(model, sampler, message):
    with pytest.raises(ValueError, match=message):
        model.draw(["a seven"], sampler=sampler)

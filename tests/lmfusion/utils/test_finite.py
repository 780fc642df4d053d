"""NaN and infinity end the request they occur in with an error; other requests continue."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from lmfusion.generation import Engine, GenerationOptions, ImageEnd, ImagePreview, encode_prompt
from tests.lmfusion.generation.models import build
from tests.lmfusion.generation.test_engine import DENOISE, EULER, PICTURES, assert_same, parts, run


@pytest.fixture(scope="module")
def model(tiny_llama):
    return build(tiny_llama)


def nan_latents(step, timestep, tensors):
    return {"latents": torch.full_like(tensors["latents"], np.nan)}


def one_nan_at_the_end(step, timestep, tensors):
    latents = tensors["latents"].clone()
    latents[0, 0, 0] = np.nan
    return {"latents": latents} if step == 2 else None


def infinite_at_the_end(step, timestep, tensors):
    return {"latents": tensors["latents"] / 0} if step == 2 else None


ANCESTRAL = EulerAncestralDiscreteScheduler(**EULER, timestep_spacing="trailing")


@pytest.mark.parametrize(
    "changes",
    [
        {"callback_on_step_end": nan_latents},
        {"callback_on_step_end": one_nan_at_the_end},
        {"callback_on_step_end": infinite_at_the_end},
        {"callback_on_step_end": nan_latents, "preview_every": 1},
        {"callback_on_step_end": nan_latents, "sampler": EulerDiscreteScheduler(**EULER)},
        {"callback_on_step_end": nan_latents, "guidance_rescale": 0.5, "image_guidance_scale": 2.0},
    ],
)
def test_an_image_that_is_not_finite_ends_its_request_alone(model, changes):
    prompt, good = encode_prompt(model, "a seven"), GenerationOptions(**{**DENOISE, "num_steps": 3})
    alone = parts(run(Engine(model, num_slots=2000), [(prompt, good)])[0])
    engine = Engine(model, num_slots=2000)
    broken = replace(good, draw_first=True, **changes)
    events = run(engine, [(prompt, broken), (prompt, good)])
    done = events[0][-1]
    assert done.finish_reason == "error" and "image 0 is not finite" in done.error and done.num_images == 0
    assert not any(isinstance(event, ImageEnd) for event in events[0]) and engine.num_slots_used == 0
    assert not any(isinstance(event, ImagePreview) and event.step > 1 for event in events[0])
    together = run(Engine(model, num_slots=2000), [(prompt, good), (prompt, broken)])[0]
    assert_same(parts(together), alone)


def test_a_scheduler_that_ends_in_nan_says_so(model):
    """With few steps EulerAncestral takes the root of a number below 0."""
    with pytest.raises(ValueError, match=r"sampler EulerAncestralDiscreteScheduler with num_steps 3.*another sampler"):
        model.draw(["a seven"], num_steps=3, sampler=ANCESTRAL)


@pytest.mark.parametrize("part", ["text", "image"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_end_in_an_error(model, part, value):
    own = copy.deepcopy(model)
    with torch.no_grad():
        for weight in getattr(own, part).parameters():
            weight.fill_(value)
    with pytest.raises(ValueError, match="not finite"):
        own.draw(["a seven"], num_steps=2)
    if part == "text":
        for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "top_k": 3}):
            with pytest.raises(ValueError, match="its logits are not finite"):
                own.generate(["a seven"], max_new_tokens=3, **options)
    else:
        expected = model.generate(["a seven"], max_new_tokens=3)[0].text
        assert own.generate(["a seven"], max_new_tokens=3)[0].text == expected
        with pytest.raises(ValueError, match="its logits are not finite"):
            own.caption([PICTURES[0]])


def test_an_autoencoder_that_decodes_to_nan_says_so(model, monkeypatch):
    decode = type(model.codec).decode

    def breaks_the_second(codec, latents):
        images = decode(codec, latents)
        images[1:2] *= np.nan
        return images

    monkeypatch.setattr(type(model.codec), "decode", breaks_the_second)
    options = GenerationOptions(**{**DENOISE, "num_steps": 1, "max_images": 1, "min_images": 1}, draw_first=True)
    engine = Engine(model, num_slots=2000)
    events = run(engine, [(encode_prompt(model, "a seven"), options)] * 3)
    assert [events[i][-1].finish_reason for i in range(3)] == ["length", "error", "length"]

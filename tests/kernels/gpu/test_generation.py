"""Generation on a GPU: the answers of the CPU, with and without graphs, and denoising steps without a wait."""

import numpy as np
import pytest
import torch

from lmfusion.generation import Engine, GenerationOptions, ImageEnd, TextDelta, encode_prompt
from tests.kernels.gpu.support import DEVICE, no_host_sync
from tests.lmfusion.conftest import tiny_llama  # noqa: F401, the fixture
from tests.lmfusion.generation.models import build

OPTIONS = {"max_new_tokens": 6, "max_images": 2, "min_images": 2, "num_steps": 6, "guidance_scale": 2.0}


@pytest.fixture
def models(tiny_llama):  # noqa: F811
    return [build(tiny_llama, torch.float32).to(device) for device in ("cpu", DEVICE)]


def answers(model, use_graphs):
    engine = Engine(model, num_slots=2000, use_graphs=use_graphs)
    prompts = ["a seven", ["one", np.zeros((8, 8), np.uint8), "and"], "x"]
    for i, prompt in enumerate(prompts):
        options = GenerationOptions(**OPTIONS, sampler=("ddpm", "dpm-solver")[i % 2])
        engine.submit(encode_prompt(model, prompt), options, index=i)
    texts, images = [""] * 3, [[], [], []]
    while engine.has_work:
        for i, event in engine.step():
            if isinstance(event, TextDelta):
                texts[i] += event.text
            elif isinstance(event, ImageEnd):
                images[i].append(np.asarray(event.image).astype(int))
    return texts, np.array(images)


@pytest.mark.parametrize("use_graphs", [True, False])
def test_answers_are_those_of_the_cpu(models, use_graphs):
    (expected_texts, expected), (texts, images) = answers(models[0], None), answers(models[1], use_graphs)
    assert texts == expected_texts
    assert np.abs(images - expected).max() <= 2


@pytest.mark.parametrize("use_graphs", [True, False])
def test_denoising_steps_wait_for_nothing(models, use_graphs):
    model = models[1]
    engine = Engine(model, num_slots=2000, use_graphs=use_graphs)
    options = GenerationOptions(**{**OPTIONS, "num_steps": 20}, draw_first=True)
    for i in range(3):
        engine.submit(encode_prompt(model, "a seven"), options, index=i)
    for _ in range(5):
        engine.step()
    torch.cuda.synchronize()
    with no_host_sync():
        for _ in range(10):
            engine.step()
    assert engine.num_running == 3

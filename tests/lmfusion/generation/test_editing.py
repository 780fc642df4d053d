"""Editing: the tokens of an edit, in all branches of its guidance, are those of training."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from lmfusion.cli import main
from lmfusion.data import DataConfig, Edit, SourceConfig
from lmfusion.data.pipeline.documents import DocumentPlanner
from lmfusion.data.pipeline.mixture import SampleRef
from lmfusion.generation import GenerationOptions, encode_prompt
from lmfusion.generation.guidance import ContextImage
from lmfusion.generation.request import Request
from lmfusion.images.png import read_settings
from tests.lmfusion.generation.models import build, tokens_of

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8))
INSTRUCTION = "make the circle blue"
DENOISE = {"draw_first": True, "max_images": 1, "max_new_tokens": 0}


@pytest.fixture(scope="module")
def model(tiny_llama):
    return build(tiny_llama)


def training_documents(model, caption_drop, num=200):
    """All documents that training makes of one edit, by what was dropped, up to the target image."""
    planner = DocumentPlanner(
        DataConfig([SourceConfig("shape_edits")], caption_drop=caption_drop),
        tokenizer=model.tokenizer,
        tokens=tokens_of(model),
        tokens_per_image=model.tokens_per_image,
        diffusion=model.config.diffusion,
        seed=0,
    )
    sample = Edit("a", lambda: PICTURE, f" {INSTRUCTION} ", lambda: PICTURE)
    documents = {plan.document for plan in planner.plan([(SampleRef(0, epoch, 0), sample) for epoch in range(num)])}
    assert all(document.spans[-2:] == (("image", model.tokens_per_image), ("marker", 1)) for document in documents)
    return sorted(((d.spans[:-2], d.token_ids[:-1]) for d in documents), key=lambda document: -len(document[1]))


def read_documents(model, **options):
    """(spans, token ids) that each branch of guidance has before the image, that of the whole prompt first."""
    prompt = encode_prompt(model, [INSTRUCTION, PICTURE])
    request = Request(model, 0, prompt, GenerationOptions(**DENOISE, **options), 0)
    request.cached, *request.branches = (SimpleNamespace(length=0) for _ in range(3))
    latents = model.codec.encode(prompt.images[0][None])[0]
    request.start([ContextImage(latents, model.tokens_per_image)])
    request.start_image(model)
    assert all(
        len(prefill.images) == prefill.document.num_images and all(i.data is latents for i in prefill.images)
        for prefill in request.prefills
    )
    return [(prefill.document.spans, prefill.document.token_ids) for prefill in request.prefills]


@pytest.mark.parametrize("image_guidance_scale", [None, 1.5])
def test_branches_are_the_documents_of_training(model, image_guidance_scale):
    everything, without_words, nothing = training_documents(model, caption_drop=0.5)
    read = read_documents(model, guidance_scale=3.0, image_guidance_scale=image_guidance_scale)
    expected = [everything, nothing] if image_guidance_scale is None else [everything, without_words, nothing]
    assert read == expected


def test_an_image_guidance_scale_of_one_needs_no_branch_without_the_image(model):
    everything, without_words, _ = training_documents(model, caption_drop=0.5)
    assert read_documents(model, guidance_scale=3.0, image_guidance_scale=1.0) == [everything, without_words]


def test_without_drops_there_is_one_document(model):
    [everything] = training_documents(model, caption_drop=0.0)
    assert read_documents(model, guidance_scale=1.0) == [everything]


def test_the_command_edits_an_image(model, tmp_path):
    """The command and the method generate the same image, and its PNG holds the settings."""
    model.save_pretrained(tmp_path / "model", parts="all")
    PICTURE.save(tmp_path / "in.png")
    options = {"num_steps": 3, "sampler": "ddim", "guidance_scale": 2.0, "image_guidance_scale": 1.5}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = ["generate", str(tmp_path / "model"), INSTRUCTION, "--image", str(tmp_path / "in.png")]
    assert main([*command, *flags, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    [expected] = model.draw([[INSTRUCTION, PICTURE]], **options)
    made = Image.open(tmp_path / "out" / "0000.png")
    assert np.array_equal(np.asarray(made), np.asarray(expected))
    settings = read_settings(tmp_path / "out" / "0000.png")
    assert settings["prompt_images"] == [str(tmp_path / "in.png")] and settings["image_guidance_scale"] == 1.5
    [ignored] = model.draw([["remove it", PICTURE]], **options)
    [other] = model.draw([[INSTRUCTION, ImageOps.invert(PICTURE)]], **options)
    assert not np.array_equal(np.asarray(ignored), np.asarray(expected))
    assert not np.array_equal(np.asarray(other), np.asarray(expected))

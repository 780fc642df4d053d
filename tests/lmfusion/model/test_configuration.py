"""Round trip through JSON, defaults that follow the LLM, errors for unknown keys and impossible sizes."""

import subprocess
import sys

import pytest
from transformers import LlamaConfig, Qwen3Config

from lmfusion.model.configuration import ImageTowerConfig, LMFusionConfig
from lmfusion.model.diffusion import DiffusionConfig

LINEAR = {"patch_coder": {"kind": "linear"}}


def llama(**changes):
    return LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, **changes)


def test_round_trip(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}
    config = LMFusionConfig(
        llama(rope_parameters=rope), {"hidden_size": 16, **LINEAR}, {"channels": 1}, {"loss_weight": 2.0}
    )
    config.save_pretrained(tmp_path)
    loaded = LMFusionConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.text_config, LlamaConfig) and loaded.text_config.rope_parameters["factor"] == 3.0
    assert isinstance(loaded.image, ImageTowerConfig) and loaded.image.patch_coder.kind == "linear"
    assert loaded.diffusion == DiffusionConfig(loss_weight=2.0) and loaded.codec.channels == 1


@pytest.mark.parametrize(
    ("image", "sizes"),
    [
        ({}, (64, 96)),
        ({"hidden_size": 16}, (16, 24)),
        ({"hidden_size": 16, "intermediate_size": 10}, (16, 10)),
        ({"intermediate_size": 10}, (64, 10)),
        ({"hidden_size": 4}, (4, 8)),
    ],
)
def test_sizes_of_the_image_tower_follow_the_llm(image, sizes):
    config = LMFusionConfig(llama(), {**image, **LINEAR})
    assert (config.image_hidden_size, config.image_intermediate_size) == sizes


def test_head_dim_is_explicit_or_derived():
    assert LMFusionConfig(llama()).head_dim == 16
    assert LMFusionConfig(Qwen3Config(hidden_size=64, num_attention_heads=4, head_dim=32)).head_dim == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colour": "red"}, "unknown key colour"),
        ({"image": {"width": 3}}, "unknown key image.width"),
        ({"image": {"patch_coder": {"size": 3}}}, "unknown key image.patch_coder.size"),
        ({"codec": {"vae": 3}}, "unknown key codec.vae"),
        ({"diffusion": {"steps": 3}}, "unknown key diffusion.steps"),
        ({"codec": {"image_size": "big"}}, "codec.image_size must be a whole number, got 'big'"),
        ({"diffusion": 3}, "diffusion must be a mapping with the keys prediction_type, .*, got 3"),
        ({"image": {"separation": "wide"}}, "image.separation must be one of deep, .*, got 'wide'"),
        ({"image": {"hidden_size": 0}}, "image.hidden_size must be .* got 0"),
        ({"image": {"hidden_size": 6.5}}, "image.hidden_size must be .* got 6.5"),
        (
            {"image": {"hidden_size": 16, "separation": "shallow"}},
            "image.hidden_size must be the text tower's 64 with separation 'shallow'",
        ),
        ({"image": {"intermediate_size": 8, "separation": "none"}}, "image.intermediate_size must be .* got 8"),
    ],
)
def test_bad_configuration(arguments, message):
    with pytest.raises(ValueError, match=message):
        LMFusionConfig(llama(), **arguments)


def test_importing_lmfusion_imports_neither_torch_nor_transformers():
    code = (
        "import lmfusion, sys; print([m for m in ('torch', 'transformers') if m in sys.modules], lmfusion.__version__)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split()[0] == "[]"


def test_names_of_the_package():
    import lmfusion

    assert lmfusion.LMFusionConfig is LMFusionConfig
    assert all(getattr(lmfusion, name) is not None for name in lmfusion.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Fusion'"):
        lmfusion.Fusion  # noqa: B018


def test_the_system_prompt_of_chats_is_saved(tmp_path):
    assert LMFusionConfig().chat_system_prompt is None
    LMFusionConfig(chat_system_prompt="You can draw.").save_pretrained(tmp_path)
    assert LMFusionConfig.from_pretrained(tmp_path).chat_system_prompt == "You can draw."
    with pytest.raises(ValueError, match="chat_system_prompt must be a text, or None for the template's own, got ' '"):
        LMFusionConfig(chat_system_prompt=" ")

"""Verification: confirms an untouched text side, names changed tensors, and sets the exit code."""

import pytest
import torch

from lmfusion.cli import main
from lmfusion.model.modeling import LMFusion
from lmfusion.model.verification import PROMPTS, verify

IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}
TENSOR = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def model(tiny_llama):
    return LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC)


def flip_a_bit(model):
    """The lowest bit of one element of the last layer's k_proj."""
    rows = model.text.layers[1].self_attn.qkv_proj.weight.data
    rows[4 * 8, 0] = torch.nextafter(rows[4 * 8, 0], torch.tensor(torch.inf))


def test_untouched_text_is_identical(model):
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter.normal_()
    found = verify(model)
    assert found.text_identical and found.changed == [] and found.num_tensors == 21
    assert [check.prompt for check in found.prompts] == list(PROMPTS)
    assert all(check.identical and check.max_difference < 1e-4 for check in found.prompts)
    assert "21 of 21" in found.table() and found.table().endswith("text identical: yes")


def test_bfloat16_is_judged_by_its_own_rounding(tiny_llama):
    """transformers' bfloat16 logits of this size are further from float32 ones than any fixed bound worth having."""
    model = LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC, dtype=torch.bfloat16)
    found = verify(model)
    assert found.text_identical
    assert all(0 < check.max_difference <= check.tolerance < 0.5 for check in found.prompts)
    model.text.layers[0].mlp.down_proj.weight.data *= 1.5
    assert not verify(model).text_identical


def test_a_single_bit_is_found(model):
    flip_a_bit(model)
    found = verify(model)
    assert found.changed == [TENSOR] and not found.text_identical
    assert TENSOR in found.table() and found.table().endswith("text identical: NO")


def test_changed_logits_are_found(model):
    model.text.layers[1].self_attn.qkv_proj.weight.data *= 1.5
    assert not any(check.identical for check in verify(model).prompts)


def test_text_in_another_dtype_is_compared_in_it(model):
    assert verify(model.to(torch.bfloat16)).text_identical


def test_a_model_without_tokenizer(model):
    model.tokenizer = None
    assert verify(model).text_identical


def test_the_exit_code_tells(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "same")
    assert main(["verify", str(tmp_path / "same")]) == 0
    assert "text identical: yes" in capsys.readouterr().out
    flip_a_bit(model)
    model.save_pretrained(tmp_path / "changed", parts="all")
    assert main(["verify", str(tmp_path / "changed")]) == 1
    assert f"changed: {TENSOR}" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "no saved model" in capsys.readouterr().err

"""The examples run, and fail if what they show does not hold."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llama_block():
    pytest.importorskip("transformers")
    return load("llama_block")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_with_two_towers(llama_block, dtype, capsys):
    assert llama_block.main(["--dtype", dtype]) == 0
    shown = capsys.readouterr().out
    assert "text-only logits after it: the same bits" in shown


def test_llama_from_a_folder(llama_block, tmp_path):
    llama_block.small_llama().save_pretrained(tmp_path)
    assert llama_block.main([str(tmp_path)]) == 0


def test_llama_with_a_wrong_weight_is_noticed(llama_block, monkeypatch, capsys):
    right = llama_block.tower_weights

    def wrong(weights):
        stacked = right(weights)
        stacked["mlp.gate_up_proj.weight"] = stacked["mlp.gate_up_proj.weight"].roll(1, 0)
        return stacked

    monkeypatch.setattr(llama_block, "tower_weights", wrong)
    assert llama_block.main([]) == 1
    assert "differ by" in capsys.readouterr().out


def test_llama_image_rows_reach_the_loss_through_the_image_tower(llama_block):
    llama = llama_block.small_llama()
    llama_block.add_image_tower(llama)
    caption = torch.arange(8)[None]
    llama_block.caption_loss(llama, caption, num_image_rows=16).backward()
    for name, parameter in llama.named_parameters():
        is_image = ".block.image." in name
        assert (parameter.grad is not None) == is_image, name
    first = llama.model.layers[0].block.image
    assert all(parameter.grad.abs().sum() > 0 for parameter in first.parameters())


def test_llama_of_another_kind_is_refused(llama_block):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, attention_bias=True, **sizes))
    with pytest.raises(ValueError, match="without biases"):
        llama_block.add_image_tower(llama)

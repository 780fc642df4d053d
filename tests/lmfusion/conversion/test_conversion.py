"""Reading LLMs: Hugging Face folders and GGUF files give transformers' weights; unreadable ones give a reason."""

import json
import os

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from lmfusion.conversion import load_base, names
from lmfusion.model.modeling import LMFusion
from tests.lmfusion.conversion.gguf_files import random_llm, write_gguf

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}


def assert_reads_as(path, llm):
    """Tensors and logits of the LLM read from `path` are those of `llm` in transformers."""
    base = load_base(path)
    expected = llm.state_dict()
    if llm.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert {names.to_llama(name) for name in base.tensors} == set(expected)
    for name, tensor in base.tensors.items():
        torch.testing.assert_close(tensor, expected[names.to_llama(name)], atol=0, rtol=0)
    ids = torch.randint(0, 40, (1, 24), generator=torch.Generator().manual_seed(1))
    base.read_tokenizer = lambda: None
    model = LMFusion.from_base(base, IMAGE, CODEC, None)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llm(ids).logits, atol=1e-4, rtol=1e-4)


# Hugging Face folders


def test_sharded_folder(tmp_path):
    llm = random_llm(LlamaConfig(**SIZES))
    llm.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_reads_as(tmp_path, llm)


def test_checkpoints_keep_their_dtype_by_default(tmp_path):
    random_llm(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {t.dtype for t in load_base(tmp_path).tensors.values()} == {torch.bfloat16}
    assert {t.dtype for t in load_base(tmp_path, torch.float32).tensors.values()} == {torch.float32}


def test_checkpoints_of_two_dtypes_take_that_of_the_embedding(tmp_path):
    llm = random_llm(LlamaConfig(**SIZES)).to(torch.bfloat16)
    llm.model.norm.float()
    llm.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert {t.dtype for t in load_base(tmp_path).tensors.values()} == {torch.bfloat16}


def test_a_folder_without_tokenizer(tmp_path):
    random_llm(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    assert load_base(tmp_path).read_tokenizer() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2'.*supported: Llama-type LLMs: llama, mistral, qwen2, qwen3"),
        ({"model_type": "not_yet_invented"}, "architecture 'not_yet_invented'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "a bias on o_proj"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised safetensors"),
    ],
)
def test_unsupported_architectures_are_named(tmp_path, changes, message):
    random_llm(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=f"{tmp_path} uses .*{message}"):
        load_base(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.truncate(f / "model.safetensors", 20_000), "model.safetensors is truncated or damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 4), "model.safetensors is truncated or damaged"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"pickle \(.bin\)"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors"),
        (
            lambda f: (f / "model.safetensors").rename(f / "a.safetensors") and write_index(f, {"x": "b.safetensors"}),
            "is missing",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "a.safetensors") and write_index(f, 3),
            "index.json is damaged",
        ),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "llama", "num_attention_heads": "x"}'),
            "config.json is not a configuration that transformers can read",
        ),
    ],
)
def test_damaged_folders_are_named(tmp_path, damage, message):
    random_llm(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        load_base(tmp_path)


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_checkpoint_that_does_not_fit_its_configuration(tmp_path):
    random_llm(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 9 tensor\(s\), first 'text.layers.2"):
        LMFusion.from_llm(tmp_path, IMAGE, CODEC)


def test_names_that_are_no_path_go_to_the_hub(tmp_path, monkeypatch):
    llm = random_llm(LlamaConfig(**SIZES))
    llm.save_pretrained(tmp_path / "snapshot")
    monkeypatch.setattr("lmfusion.conversion.hub.snapshot_download", lambda name, **_: str(tmp_path / "snapshot"))
    assert load_base("someone/llm").name == "someone/llm"

    def offline(name, **_):
        raise ConnectionError("no route")

    monkeypatch.setattr("lmfusion.conversion.hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"no base model at 'someone/llm'.*\(ConnectionError\)"):
        load_base("someone/llm")


def test_a_file_that_is_no_llm(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"must be a Hugging Face folder or a \.gguf file"):
        load_base(tmp_path / "notes.txt")


# GGUF files


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        LlamaConfig(**SIZES, head_dim=16),
        Qwen2Config(**SIZES),
        Qwen3Config(**SIZES, head_dim=16),
    ],
    ids=["llama", "tied", "head_dim", "qwen2", "qwen3"],
)
def test_gguf(tmp_path, config):
    llm = random_llm(config)
    assert_reads_as(write_gguf(tmp_path / "llm.gguf", llm), llm)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0"])
def test_gguf_is_dequantised(tmp_path, quantization):
    llm = random_llm(LlamaConfig(**SIZES))
    path = write_gguf(tmp_path / "llm.gguf", llm, gguf.GGMLQuantizationType[quantization])
    base = load_base(path)
    assert {t.dtype for t in base.tensors.values()} == {torch.float32}
    for name, tensor in base.tensors.items():
        torch.testing.assert_close(tensor, llm.state_dict()[names.to_llama(name)], atol=4e-3, rtol=1e-2)
    assert load_base(path, torch.bfloat16).tensors["text.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        (
            {"rope_type": "linear", "factor": 4.0},
            {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": 4.0},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            {
                "{arch}.rope.scaling.type": "yarn",
                "{arch}.rope.scaling.factor": 4.0,
                "{arch}.rope.scaling.original_context_length": 16,
            },
        ),
    ],
    ids=["linear", "yarn"],
)
def test_gguf_rope_scaling(tmp_path, rope, metadata):
    llm = random_llm(LlamaConfig(**SIZES, rope_parameters={"rope_theta": 500.0, **rope}))
    assert_reads_as(write_gguf(tmp_path / "llm.gguf", llm, metadata=metadata), llm)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_gguf_with_llama3s_table(tmp_path):
    llm = random_llm(
        LlamaConfig(**{**SIZES, "head_dim": 64, "max_position_embeddings": 131072}, rope_parameters=LLAMA3)
    )
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    divisors = (plain / llm.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    path = write_gguf(tmp_path / "llm.gguf", llm, extra={"rope_freqs.weight": divisors})
    assert load_base(path).config.rope_parameters["factor"] == pytest.approx(32)
    assert_reads_as(path, llm)
    wrong = write_gguf(
        tmp_path / "wrong.gguf", llm, extra={"rope_freqs.weight": np.linspace(1, 32, 32, dtype=np.float32)}
    )
    with pytest.raises(ValueError, match="rope_freqs that are not Llama 3's"):
        load_base(wrong)


def test_gguf_with_a_sliding_window_is_mistral(tmp_path):
    llm = random_llm(MistralConfig(**SIZES, sliding_window=48))
    path = write_gguf(tmp_path / "llm.gguf", llm, metadata={"{arch}.attention.sliding_window": 48})
    assert load_base(path).config.sliding_window == 48
    assert_reads_as(path, llm)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma'"),
        ({"{arch}.expert_count": 8}, "a mixture of experts"),
        ({"{arch}.rope.dimension_count": 4}, "rotates in part"),
        ({"{arch}.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
    ],
)
def test_unsupported_gguf_is_named(tmp_path, metadata, message):
    llm = random_llm(LlamaConfig(**SIZES))
    if "general.architecture" in metadata:
        llm.config.model_type, metadata = "gemma", None
    path = write_gguf(tmp_path / "llm.gguf", llm, metadata=metadata)
    with pytest.raises(ValueError, match=f"{path} uses .*{message}"):
        load_base(path)


@pytest.mark.parametrize("size", [0, 3, 200, 3000, 60_000])
def test_truncated_gguf_is_named(tmp_path, size):
    path = write_gguf(tmp_path / "llm.gguf", random_llm(LlamaConfig(**SIZES)))
    assert os.path.getsize(path) > 60_000
    os.truncate(path, size)
    with pytest.raises(ValueError, match=r"llm\.gguf is truncated or not a GGUF file"):
        load_base(path)


def test_gguf_without_a_tensor_or_with_a_foreign_one(tmp_path):
    llm = random_llm(LlamaConfig(**SIZES))
    path = write_gguf(tmp_path / "extra.gguf", llm, extra={"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=r"do not belong to this architecture, first 'blk.0.attn_sinks.weight'"):
        LMFusion.from_llm(path, IMAGE, CODEC)
    llm.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"first 'text.layers.2"):
        LMFusion.from_llm(write_gguf(tmp_path / "short.gguf", llm), IMAGE, CODEC)


# Names


def test_stack_undoes_split(tmp_path):
    llm = random_llm(Qwen2Config(**SIZES))
    llm.save_pretrained(tmp_path)
    base = load_base(tmp_path)
    stacked = names.stack(dict(base.tensors))
    assert stacked["text.layers.1.self_attn.qkv_proj.bias"].shape == (64,)
    assert not any("q_proj" in name or ("up_proj.weight" in name and "gate" not in name) for name in stacked)
    again = names.split(stacked, base.config)
    assert set(again) == set(base.tensors) and all(torch.equal(again[name], t) for name, t in base.tensors.items())
    files = load_file(tmp_path / "model.safetensors")
    assert {names.from_llama(name) for name in files} == set(again)
    assert {names.to_llama(name) for name in again} == set(files)

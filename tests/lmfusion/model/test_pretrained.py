"""What transformers' users expect of a model: loading, dtype, device, embeddings, checkpointing, export."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lmfusion.model import saving
from lmfusion.model.modeling import LMFusion

IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}
IDS = torch.arange(3, 12)[None]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


# Loading


@pytest.mark.parametrize("auto", [AutoModel, LMFusion])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "auto"}, torch.float32),
        ({"torch_dtype": torch.float64}, torch.float64),
        ({"torch_dtype": "auto"}, torch.float32),
        ({"device_map": "cpu"}, torch.float32),
        ({"device_map": {"": "cpu"}}, torch.float32),
        ({"device_map": torch.device("cpu")}, torch.float32),
        ({"low_cpu_mem_usage": True, "local_files_only": True, "trust_remote_code": False}, torch.float32),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_arguments_of_from_pretrained(saved, model, auto, options, dtype):
    loaded = auto.from_pretrained(str(saved), **options)
    assert isinstance(loaded, LMFusion) and not loaded.training
    assert loaded.dtype == dtype and loaded.device == torch.device("cpu")
    assert torch.equal(loaded.text.norm.weight, model.text.norm.weight.to(dtype))
    assert loaded.name_or_path == str(saved)


def test_a_device_is_where_the_model_is_put(saved):
    assert {p.device.type for p in AutoModel.from_pretrained(saved, device_map="meta").parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "dtype must be a torch.dtype, its name .* got 'bf16'"),
        ({"dtype": "nn"}, "dtype must be .* got 'nn'"),
        ({"device_map": "balanced"}, "device_map must name one device, .* got 'balanced'"),
        ({"device_map": {"text": "cpu", "image": "cpu"}}, "device_map must name one device"),
        ({"attn_implementation": "sdpa"}, "unknown argument 'attn_implementation'"),
        ({"quantization_config": {"load_in_4bit": True}}, "unknown argument 'quantization_config'"),
    ],
)
def test_arguments_that_do_not_apply(saved, options, message):
    with pytest.raises(ValueError, match=message):
        LMFusion.from_pretrained(saved, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", {"": "cuda"}, torch.device("cuda", 0)])
def test_a_device_that_is_not_here(saved, device_map):
    with pytest.raises(ValueError, match="device_map must be auto or cpu where PyTorch finds no GPU"):
        AutoModel.from_pretrained(saved, device_map=device_map)


@pytest.mark.slow
def test_a_fresh_process_loads_it_by_auto_classes(saved):
    code = (
        "import lmfusion.hub\n"
        "from transformers import AutoConfig, AutoModel, AutoTokenizer\n"
        f"folder = {str(saved)!r}\n"
        "model = AutoModel.from_pretrained(folder, dtype='bfloat16', device_map='cpu')\n"
        "print(type(model).__name__, model.dtype, AutoConfig.from_pretrained(folder).model_type,\n"
        "      AutoTokenizer.from_pretrained(folder)('a').input_ids)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "LMFusion torch.bfloat16 lmfusion [1, 67]\n", result.stderr


# A model like others


def test_sizes_and_places(model):
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.image.parameters())
    assert model.get_memory_footprint() >= 4 * model.num_parameters()
    half = LMFusion(model.config).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.eval() is half


def test_dtype_is_that_of_the_text_not_the_codec(model, tiny_llama, monkeypatch):
    other = LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC, dtype=torch.float64)
    other.codec.register_parameter("first", torch.nn.Parameter(torch.ones(1)))
    assert next(other.parameters()).dtype == torch.float32 and other.dtype == torch.float64


def test_embeddings(model):
    assert model.get_input_embeddings() is model.text.embed_tokens
    assert model.get_output_embeddings() is model.text.lm_head
    before = model.text.embed_tokens.weight.shape
    with pytest.raises(ValueError, match="the vocabulary is the base LLM's"):
        model.resize_token_embeddings(300)
    assert model.get_input_embeddings().weight.shape == before == (model.boi_token_id, 32)


def test_checkpointing_is_recompute(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not model.is_gradient_checkpointing
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert model.recompute == "layer" and model.is_gradient_checkpointing and model.is_activation_checkpointing
        model.gradient_checkpointing_disable()
        assert model.recompute == "none" and not model.is_gradient_checkpointing
        model.activation_checkpointing_enable()
        assert model.recompute == "layer"
        model.activation_checkpointing_disable()
        assert model.recompute == "none"
    with pytest.raises(ValueError, match=r"every_n_layers must be 1 .* got 2"):
        model.activation_checkpointing_enable(every_n_layers=2)


def test_nothing_is_uploaded(model):
    with pytest.raises(ValueError, match="save_pretrained"):
        model.push_to_hub("me/mine")


# Files


def test_all_parts_in_safetensors_with_llamas_names(model, tiny_llama, tmp_path):
    model.save_pretrained(tmp_path / "m", parts="all")
    llama = {name.removeprefix("model.") for name in LlamaForCausalLM.from_pretrained(tiny_llama).state_dict()}
    layers = {name for name in llama if name.startswith("layers.")}
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert {name.removeprefix("text.") for name in names if name.startswith("text.")} == llama
    assert {name.removeprefix("image.") for name in names if name.startswith("image.layers.")} == layers


FAMILIES = {
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_tower_alone_is_an_llm_to_transformers(tmp_path, tokenizer, family, dtype):
    config, cls, settings = FAMILIES[family]
    torch.manual_seed(0)
    llm = cls(
        config(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, **settings)
    ).to(dtype).eval()  # fmt: skip
    llm.save_pretrained(tmp_path / "llm")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")  # whose rope frequencies were not rounded
    tokenizer.save_pretrained(tmp_path / "llm")
    LMFusion.from_llm(tmp_path / "llm", image=IMAGE, codec=CODEC).save_text(tmp_path / "text")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert type(loaded) is cls and loaded.dtype == dtype
    expected = llm.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(IDS).logits, llm(IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "text")("a b").input_ids == tokenizer("a b").input_ids


def test_a_trained_text_tower_is_exported_and_can_be_a_base_again(tiny_llama, tmp_path):
    model = LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC)
    model.freeze_text(False)
    with torch.no_grad():
        model.text.norm.weight *= 2
    model.save_text(tmp_path / "text")
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "text")(IDS).logits
    torch.testing.assert_close(logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    again = LMFusion.from_llm(tmp_path / "text", image=IMAGE, codec=CODEC)
    assert torch.equal(again.text.norm.weight, model.text.norm.weight)


def test_text_is_exported_in_the_dtype_it_has(tiny_llama, tmp_path):
    LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC, dtype=torch.bfloat16).save_text(tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "text").dtype == torch.bfloat16


def test_text_is_written_into_a_new_folder_alone(model, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", 4000)
    model.save_text(tmp_path / "text")
    index = json.loads((tmp_path / "text" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.embed_tokens.weight" in index and "lm_head.weight" in index
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "text").lm_head.weight, model.text.lm_head.weight
    )
    with pytest.raises(ValueError, match="exists; give the path of a new or an empty folder"):
        model.save_text(tmp_path / "text")
    assert AutoConfig.from_pretrained(tmp_path / "text").model_type == "llama"

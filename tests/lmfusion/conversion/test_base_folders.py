"""Unusual folders of LLMs and VLMs: heads, end tokens, ids beyond the embedding, impossible sizes and names."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from lmfusion.cli import main
from lmfusion.conversion import load_base, open_base
from lmfusion.generation.prompt import end_token_ids
from lmfusion.model.modeling import LMFusion
from lmfusion.model.verification import verify
from tests.lmfusion.vlms import save_vlm

IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}
IMAGES = ["--codec", "pixels", "--channels", "1", "--image-size", "8", "--patch-coder", "linear"]
IDS = torch.tensor([[1, 70, 80, 90, 100, 110]])


@pytest.fixture
def base(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "base")


def change(path, **settings):
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | settings))


def from_llm(folder):
    return LMFusion.from_llm(folder, IMAGE, CODEC)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


# Heads


@pytest.mark.parametrize("is_same", [False, True])
def test_a_head_in_the_file_of_a_tied_model_is_what_transformers_makes_of_it(base, tmp_path, is_same):
    change(base / "config.json", tie_word_embeddings=True)
    if is_same:
        change_tensors(base, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    theirs = AutoModelForCausalLM.from_pretrained(base)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == is_same
    model = from_llm(base)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits)
    assert verify(model).text_identical
    assert (model.text.lm_head is None) == is_same == model.config.text_config.tie_word_embeddings
    for parts in ("image", "all"):
        model.save_pretrained(tmp_path / parts, parts=parts)
        with torch.no_grad():
            assert torch.equal(LMFusion.from_pretrained(tmp_path / parts)(IDS).logits, model(IDS).logits)


def test_a_head_in_shards(base):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink()
    change(base / "config.json", tie_word_embeddings=True)
    assert verify(from_llm(base)).text_identical and not open_base(base).config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("is_same", [False, True])
def test_a_head_in_the_file_of_a_tied_vlm(tmp_path, kind, is_same):
    save_vlm(tmp_path, kind)
    change(tmp_path / "config.json", tie_word_embeddings=True)
    if is_same:
        change_tensors(
            tmp_path,
            lambda t: {n: t[_embedding(t)].clone() if n.endswith("lm_head.weight") else x for n, x in t.items()},
        )
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path)
    model = LMFusion.from_vlm(tmp_path, IMAGE, CODEC)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(input_ids=IDS).logits)
    assert verify(model).text_identical and (model.text.lm_head is None) == is_same


def _embedding(tensors):
    return next(name for name in tensors if name.endswith("embed_tokens.weight"))


def test_verify_reads_the_folder_as_transformers_does(base, monkeypatch):
    """A reader that leaves out the head would agree with itself."""
    change(base / "config.json", tie_word_embeddings=True)
    monkeypatch.setattr("lmfusion.conversion.huggingface.keep_own_head", lambda *_: None)
    assert not verify(from_llm(base)).text_identical


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.sinks",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.mlp.gate_proj.weight_scale",
        "lm_head.bias",
        "score.weight",
    ],
)
def test_tensors_that_the_architecture_does_not_have_are_named(base, name):
    change_tensors(base, lambda t: t | {name: torch.ones(3)})
    with pytest.raises(ValueError, match="belong to this architecture, first 'text.*" + name.removeprefix("model.")):
        from_llm(base)


def test_tensors_that_follow_from_the_configuration_are_no_matter(base):
    change_tensors(base, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    from_llm(base)


@pytest.mark.parametrize("twice", ["norm.weight", "text.norm.weight"])
def test_one_tensor_under_two_names(base, twice):
    change_tensors(base, lambda t: t | {twice: torch.ones(32)})
    with pytest.raises(ValueError, match=r"under two names|do not belong to this architecture"):
        from_llm(base)


def test_a_tensor_in_two_shards(base):
    shutil.copy(base / "model.safetensors", base / "a.safetensors")
    (base / "model.safetensors").rename(base / "b.safetensors")
    change(base / "model.safetensors.index.json", weight_map={"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(ValueError, match=r"b\.safetensors holds the tensor .* another shard"):
        from_llm(base)


@pytest.mark.parametrize("shard", ["../base/a.safetensors", "/a.safetensors", "a.bin", "", 3, "*"])
def test_shards_lie_beside_their_index(base, shard):
    (base / "model.safetensors").unlink()
    change(base / "model.safetensors.index.json", weight_map={"x": shard})
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        from_llm(base)


def test_weights_that_are_whole_numbers(base):
    change_tensors(base, lambda t: t | {"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"tensor 'model\.norm\.weight' of type torch\.int8"):
        from_llm(base)


# End tokens


@pytest.mark.parametrize(("named", "expected"), [([2, 100], {2, 100}), (100, {2, 100}), (None, {2}), ([], {2})])
def test_end_tokens_of_the_generation_config(base, tmp_path, named, expected):
    GenerationConfig(eos_token_id=named).save_pretrained(base)
    model = from_llm(base)
    assert end_token_ids(model) == expected
    model.save_pretrained(tmp_path / "saved")
    assert end_token_ids(LMFusion.from_pretrained(tmp_path / "saved")) == expected
    model.save_text(tmp_path / "text")
    ids = AutoModelForCausalLM.from_pretrained(tmp_path / "text").generation_config.eos_token_id
    assert set(ids if isinstance(ids, list) else [ids]) == expected


def test_an_answer_ends_at_an_end_token_of_the_generation_config(base):
    """Every token ends it, so that whatever comes first does."""
    assert from_llm(base).generate(["a"], max_new_tokens=5)[0].finish_reason == "length"
    change(base / "generation_config.json", eos_token_id=list(range(3, 259)))
    [answer] = from_llm(base).generate(["a"], max_new_tokens=5)
    assert answer.finish_reason == "stop" and answer.text == ""


def test_end_tokens_of_a_vlms_generation_config(tmp_path):
    save_vlm(tmp_path)
    change(tmp_path / "generation_config.json", eos_token_id=[2, 100])
    assert end_token_ids(LMFusion.from_vlm(tmp_path, IMAGE, CODEC)) == {2, 100}


@pytest.mark.parametrize("named", ["</s>", [2, "x"], [True], [[2]]])
def test_end_tokens_that_are_none(base, named):
    change(base / "generation_config.json", eos_token_id=named)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a token id"):
        from_llm(base)


@pytest.mark.parametrize(
    ("file", "settings"),
    [("generation_config.json", {"eos_token_id": [2, 259]})]
    + [("config.json", {name: 260}) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    + [("config.json", {"eos_token_id": [2, -2]})],
)
def test_ids_beyond_the_vocabulary_would_be_boi_and_eoi(base, file, settings):
    change(base / file, **settings)
    [name] = settings
    with pytest.raises(ValueError, match=rf"{name} must be a token id from 0 to 258, .* got .*; correct {name}"):
        from_llm(base)


def test_an_image_token_beyond_the_vocabulary(tmp_path):
    save_vlm(tmp_path)
    change(tmp_path / "config.json", image_token_index=260)
    with pytest.raises(
        ValueError,
        match=r"image_token_index must be a token id from 0 to 259, .*, got 260",
    ):
        LMFusion.from_vlm(tmp_path, IMAGE, CODEC)


# Tokenizers


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("special", [False, True])
def test_a_tokenizer_larger_than_the_embedding(base, tmp_path, capsys, number, special):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(f"<{i}>", special=special) for i in range(number)], special_tokens=special)
    tokenizer.save_pretrained(base)
    assert main(["adapt", str(base), str(tmp_path / "out"), *IMAGES]) != 0
    error = capsys.readouterr().err
    assert f"has {259 + number} tokens with ids up to {258 + number}" in error and "has 259 rows" in error
    assert f"resize_token_embeddings({259 + number})" in error and not (tmp_path / "out").exists()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(259 + number)
    model.save_pretrained(base)
    from_llm(base)  # as the error says


def test_a_tokenizer_with_gaps(base):
    """As few tokens as the embedding has rows, one of them beyond it."""
    tokens = {token: i for i, token in enumerate(["<unk>", "a", "b"])} | {"c": 1000}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="<unk>")), unk_token="<unk>"
    ).save_pretrained(base)
    with pytest.raises(ValueError, match=r"has 4 tokens with ids up to 1000 \('c'\), but the embedding has 259 rows"):
        from_llm(base)


def test_a_saved_models_tokenizer_is_checked_too(base, tmp_path):
    from_llm(base).save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "saved")
    record = json.loads((tmp_path / "saved" / "base.json").read_text())
    del record["files"]  # as models were saved before the tokenizer had a digest
    (tmp_path / "saved" / "base.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"ids up to 259 \('<new>'\)"):
        LMFusion.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("special", [[], ["<s>"]])
def test_an_empty_vocabulary(base, special):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match=f"the tokenizer .*{base}.*(has an empty vocabulary|is damaged)"):
        from_llm(base)


# Sizes and numbers

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 1e9},
        {"hidden_size": 10**12},
        {"hidden_size": 0},
        {"vocab_size": 10**15},
        {"vocab_size": 0},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 0},
        {"head_dim": 0},
        {"head_dim": 10**9},
        {"head_dim": 7},
        {"rms_norm_eps": math.nan},
        {"rms_norm_eps": 0.0},
        {"rms_norm_eps": -1e-5},
        {"rms_norm_eps": math.inf},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": math.nan}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": math.nan}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": math.inf}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}},
        {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
        {"rope_parameters": LLAMA3 | {"low_freq_factor": math.nan}},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 0}},
        {"max_position_embeddings": 0},
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_numbers_that_no_model_has(base, settings, model_type):
    change(base / "config.json", model_type=model_type, **settings)
    with pytest.raises(ValueError, match=str(base)):
        from_llm(base)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("vision_config", {"num_hidden_layers": 10**9}),
        ("vision_config", {"hidden_size": 65536, "intermediate_size": 262144}),
        ("vision_config", {"image_size": 4096, "patch_size": 1}),
        ("text_config", {"num_hidden_layers": 10**9}),
    ],
)
def test_sizes_of_a_vlm_are_compared_with_its_file_before_memory_is_taken(tmp_path, part, settings):
    save_vlm(tmp_path, "llava")
    config = json.loads((tmp_path / "config.json").read_text())
    change(tmp_path / "config.json", **{part: config[part] | settings})
    with pytest.raises(ValueError, match=r"num_hidden_layers must be|configuration.s shape"):
        LMFusion.from_vlm(tmp_path, IMAGE, CODEC)


def test_deeply_nested_json(base):
    (base / "config.json").write_text('{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_base(base)

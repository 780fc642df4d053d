"""Saving and loading: nothing is lost, the base is checked, a failed save keeps the old model, errors name files."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

from lmfusion.model import saving
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.modeling import LMFusion
from lmfusion.model.records import tensor_digests

IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}


@pytest.fixture
def model(tiny_llama):
    return LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC, diffusion={"prediction_type": "v_prediction"})


def assert_same(model, other):
    theirs = other.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert json.loads(other.config.to_json_string()) == json.loads(model.config.to_json_string())


@pytest.mark.parametrize("parts", ["image", "all"])
@pytest.mark.parametrize(
    "image", [IMAGE, {**IMAGE, "hidden_size": None}, {**IMAGE, "hidden_size": None, "separation": "none"}]
)
def test_saved_and_loaded_is_the_same(tiny_llama, tmp_path, parts, image):
    model = LMFusion.from_llm(tiny_llama, image=image, codec=CODEC, diffusion={"loss_weight": 2.0})
    model.image.marker_embedding.data.normal_()
    model.save_pretrained(tmp_path / "m", parts)
    loaded = LMFusion.from_pretrained(tmp_path / "m")
    assert_same(model, loaded)
    assert loaded.base == model.base and loaded.frozen_text and not loaded.training
    assert loaded.tokenizer("a b")["input_ids"] == model.tokenizer("a b")["input_ids"]


def test_files_hold_llama_names_and_the_image_part_alone(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    names = set(load_file(tmp_path / "m" / "model.safetensors"))
    assert all(name.startswith("image.") for name in names)
    layer = {n.removeprefix("image.layers.1.") for n in names if n.startswith("image.layers.1.")}
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert layer == {f"{n}.weight" for n in [*projections, "input_layernorm", "post_attention_layernorm"]}
    assert len({file.stat().st_mode for file in (tmp_path / "m").iterdir()}) == 1
    base = json.loads((tmp_path / "m" / "base.json").read_text())["base"]
    assert "model.layers.0.self_attn.q_proj.weight" in base["sha256"] and "lm_head.weight" in base["sha256"]


def test_all_parts_need_no_base(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "llm")
    model = LMFusion.from_llm(tmp_path / "llm", image=IMAGE, codec=CODEC)
    model.save_pretrained(tmp_path / "image")
    model.save_pretrained(tmp_path / "all", parts="all")
    (tmp_path / "llm").rename(tmp_path / "elsewhere")
    assert_same(model, LMFusion.from_pretrained(tmp_path / "all"))
    with pytest.raises(FileNotFoundError, match="give its place with base="):
        LMFusion.from_pretrained(tmp_path / "image")
    assert_same(model, LMFusion.from_pretrained(tmp_path / "image", base=tmp_path / "elsewhere"))


def test_another_base_is_refused(model, tiny_llama, tmp_path):
    model.save_pretrained(tmp_path / "m")
    shutil.copytree(tiny_llama, tmp_path / "llm")
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of 21 tensors differ, first 'model.norm.weight'"):
        LMFusion.from_pretrained(tmp_path / "m", base=tmp_path / "llm")


def test_sharded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", 4000)
    model.save_pretrained(tmp_path / "m", parts="all")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    assert_same(model, LMFusion.from_pretrained(tmp_path / "m"))
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "m", parts="all")
    assert [f.name for f in (tmp_path / "m").glob("model*")] == ["model.safetensors"]


def test_trained_text_is_only_saved_whole(model, tmp_path):
    model.freeze_text(False)
    model.text.norm.weight.data *= 2
    model.freeze_text(True)
    with pytest.raises(ValueError, match="use parts='all'"):
        model.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m", parts="all")
    assert_same(model, LMFusion.from_pretrained(tmp_path / "m"))


def test_loading_in_another_dtype(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    loaded = LMFusion.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    loaded.save_pretrained(tmp_path / "half")
    assert LMFusion.from_pretrained(tmp_path / "half").text.norm.weight.dtype == torch.float32


def test_an_autoencoder_is_saved_with_all_parts(tiny_llama, tmp_path, monkeypatch):
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=2, **blocks, **counts).save_pretrained(
        tmp_path / "vae"
    )
    monkeypatch.chdir(tmp_path)
    codec = {"kind": "autoencoder_tiny", "path": "vae", "channels": 1, "image_size": 8}
    model = LMFusion.from_llm(tiny_llama, image=IMAGE, codec=codec)
    model.save_pretrained("image")
    model.save_pretrained("all", parts="all")
    monkeypatch.chdir(tmp_path.parent)
    assert_same(model, LMFusion.from_pretrained(tmp_path / "image"))
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no autoencoder at"):
        LMFusion.from_pretrained(tmp_path / "image")
    loaded = LMFusion.from_pretrained(tmp_path / "all", dtype=torch.bfloat16)
    pixels = torch.rand(1, 1, 8, 8)
    assert torch.equal(loaded.codec.encode(pixels), model.codec.encode(pixels))


def test_a_base_read_as_bfloat16_is_read_so_again(tiny_llama, tmp_path):
    model = LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    assert_same(model, LMFusion.from_pretrained(tmp_path / "m"))


def test_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "m"), LMFusionConfig)
    assert_same(model, AutoModel.from_pretrained(tmp_path / "m"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["import lmfusion.hub, transformers", "import transformers; transformers.AutoModel; import lmfusion.hub"]
)
def test_auto_model_after_import_of_the_hub_module(model, tmp_path, order):
    model.save_pretrained(tmp_path / "m")
    code = f"{order}; print(type(transformers.AutoModel.from_pretrained({str(tmp_path / 'm')!r})).__module__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "lmfusion.model.modeling\n", result.stderr


def test_a_model_made_without_a_base(tmp_path):
    text = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = LMFusion(LMFusionConfig(text, {"patch_coder": {"kind": "linear"}}, CODEC))
    with pytest.raises(ValueError, match="made without a base LLM"):
        model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="parts must be one of image, all, got 'text'"):
        model.save_pretrained(tmp_path / "m", parts="text")
    model.save_pretrained(tmp_path / "m", parts="all")
    assert_same(model, LMFusion.from_pretrained(tmp_path / "m"))


# Failures


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["lmfusion.model.saving.save_file", "os.fsync", "os.rename"])
def test_a_full_disk_keeps_the_old_model(model, tmp_path, monkeypatch, failing):
    model.save_pretrained(tmp_path / "m")
    old = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    model.image.marker_embedding.data.normal_()
    monkeypatch.setattr(failing, no_space)
    with pytest.raises(OSError, match=r"could not save the model to .*No space left.*is untouched"):
        model.save_pretrained(tmp_path / "m")
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == old
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    model.save_pretrained(tmp_path / "m")
    assert_same(model, LMFusion.from_pretrained(tmp_path / "m"))


def test_a_full_disk_while_the_tokenizer_is_written(model, tmp_path, monkeypatch):
    def no_space_of_tokenizers(*_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(model.tokenizer, "save_pretrained", no_space_of_tokenizers)
    with pytest.raises(OSError, match=r"could not save the model to .*No space left"):
        model.save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_last_rename_puts_the_old_model_back(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "m")
    rename, calls = os.rename, []

    def fail_second(*names):
        calls.append(names)
        if len(calls) == 2:
            no_space()
        rename(*names)

    monkeypatch.setattr("os.rename", fail_second)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "m")
    monkeypatch.undo()
    assert len(calls) == 3
    assert [folder.name for folder in tmp_path.iterdir()] == ["m"]
    assert_same(model, LMFusion.from_pretrained(tmp_path / "m"))


def test_killed_between_the_renames(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.previous")
    assert_same(model, LMFusion.from_pretrained(tmp_path / "m"))


def test_other_peoples_files(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "README.md").read_text() == "mine"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds no lmfusion model"):
        model.save_pretrained(tmp_path / "thesis")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "config.json").unlink(), "no saved model"),
        (lambda m: (m / "config.json").write_text('{"model_'), "config.json is damaged"),
        (
            lambda m: edit_json(m / "config.json", model_type="llama"),
            "must hold a model of type 'lmfusion', got 'llama'",
        ),
        (lambda m: edit_json(m / "config.json", colour="red"), "unknown key colour"),
        (lambda m: edit_json(m / "config.json", image={"hidden": 3}), "unknown key image.hidden"),
        (lambda m: (m / "base.json").unlink(), "base.json is missing"),
        (lambda m: edit_json(m / "base.json", parts="most"), 'parts must be "all"'),
        (lambda m: edit_json(m / "base.json", base=None), 'parts must be "all"'),
        (lambda m: edit_json(m / "base.json", base={"nam": "x"}), "unknown key base.nam"),
        (lambda m: os.truncate(m / "model.safetensors", 5000), "truncated or damaged"),
        (lambda m: (m / "model.safetensors").unlink(), "holds neither"),
    ],
)
def test_damaged_files_are_named(model, tmp_path, damage, message):
    model.save_pretrained(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises((ValueError, OSError), match=message):
        LMFusion.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("image.norm.weight"), "lacks 1 tensor.*image.norm.weight"),
        (lambda t: t.clear(), r"lacks \d+ tensor.*image\."),
        (
            lambda t: t.update({"image.extra": torch.zeros(1)}),
            "belong to this architecture, first 'image.extra'",
        ),
        (
            lambda t: t.update({"image.norm.weight": torch.zeros(3)}),
            r"must have the configuration's shape \(16,\), got \(3,\)",
        ),
    ],
)
def test_wrong_tensors_are_named(model, tmp_path, change, message):
    model.save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        LMFusion.from_pretrained(tmp_path / "m")


def test_names_are_those_of_transformers(model, tiny_llama):
    llm = LlamaForCausalLM.from_pretrained(tiny_llama)
    assert set(model.base.sha256) == set(llm.state_dict())
    assert (
        tensor_digests({"text." + k.removeprefix("model."): t for k, t in llm.state_dict().items()})
        == model.base.sha256
    )

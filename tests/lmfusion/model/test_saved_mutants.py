"""Wrong values in the files of a saved model: each gives a model that works, or one error that names the file."""

import copy
import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.modeling import LMFusion
from tests.lmfusion.vlms import build, save_vlm

IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}
WRONG = (None, True, 0, -1, 7, 10**9, 10**30, 0.5, 1e300, "", "load", "é" * 1000, [], [1, 2], [None], {}, {"a": 1})


@pytest.fixture(scope="module")
def saved(tiny_llama, tmp_path_factory):
    """A model saved as its image part, and whole."""
    folder = tmp_path_factory.mktemp("mutants")
    model = LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC)
    model.save_pretrained(folder / "image")
    model.save_pretrained(folder / "all", parts="all")
    return folder


def paths_of(values, prefix=()):
    """Every key of nested JSON values; of the digests of tensors one is enough."""
    keys = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(keys)[: 1 if prefix[-1:] == ("sha256",) else None]:
        yield (*prefix, key)
        yield from paths_of(value, (*prefix, key))


def mutants(values):
    """(key, changed values): each key with each wrong value, and without it."""
    for path in paths_of(values):
        for wrong in (*WRONG, KeyError):
            changed = copy.deepcopy(values)
            *parents, last = path
            place = changed
            for key in parents:
                place = place[key]
            if wrong is KeyError:
                del place[last]
            else:
                place[last] = wrong
            yield f"{'.'.join(map(str, path))} = {wrong!r:.40}", changed


def check_works(model):
    """Text and an image go through it, and everything is finite."""
    ids = torch.arange(4)[None]
    with torch.inference_mode():
        assert model(input_ids=ids).logits.isfinite().all()
        if model.config.text_config.max_position_embeddings > 16:
            images = model.draw(["a"], num_steps=1)
            assert images[0].size[0] == model.codec.config.image_size


def failures_of(folder, name, is_tried=lambda what: True):
    """What goes wrong with the mutants of a file of the model in `folder`."""
    file = folder / name
    values = json.loads(file.read_text())
    failures = []
    for what, changed in mutants(values):
        if not is_tried(what):
            continue
        file.write_text(json.dumps(changed))
        start = time.monotonic()
        try:
            check_works(LMFusion.from_pretrained(folder))
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            of_base = ("the base LLM of this model is not at", "is not the one this model was made from")
            if str(folder) not in message and not any(words in message for words in of_base):
                failures.append(f"{what}: does not name the file: {message[:200]}")
            if len(message) > 1000:
                failures.append(f"{what}: an error of {len(message)} characters: {message[:100]}")
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        if time.monotonic() - start > 10:
            failures.append(f"{what}: {time.monotonic() - start:.0f} s")
    file.write_text(json.dumps(values))
    return failures


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["image", "all"])
@pytest.mark.parametrize("name", ["config.json", "base.json"])
def test_every_mutant_works_or_is_refused(saved, tmp_path, parts, name):
    folder = shutil.copytree(saved / parts, tmp_path / "m")
    failures = failures_of(folder, name)
    assert not failures, f"{len(failures)}\n" + "\n".join(failures)


@pytest.mark.slow
def test_every_mutant_of_a_vision_language_model(tmp_path):
    save_vlm(tmp_path / "vlm", "llava_next", "qwen2", "siglip")
    build(tmp_path / "vlm").save_pretrained(tmp_path / "m", parts="all")
    words = ("_size", "num_", "layer", "image_", "model_type", "vision_config =")
    failures = failures_of(tmp_path / "m", "config.json", lambda what: any(word in what for word in words))
    assert not failures, f"{len(failures)}\n" + "\n".join(failures)


def set_in(file, path, value):
    values = json.loads(file.read_text())
    *parents, last = path.split(".")
    place = values
    for key in parents:
        place = place[key]
    place[last] = value
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.num_hidden_layers", 10**9),
        ("text_config.num_hidden_layers", 3),
        ("text_config.hidden_size", 0),
        ("text_config.hidden_size", 10**9),
        ("text_config.vocab_size", 10**12),
        ("text_config.num_attention_heads", 0),
        ("text_config.num_key_value_heads", 0),
        ("text_config.num_key_value_heads", 3),
        ("text_config.head_dim", 0),
        ("text_config.head_dim", 7),
        ("text_config.head_dim", 10**9),
        ("text_config.rope_parameters.rope_theta", 0),
        ("text_config.rope_parameters.rope_theta", -1.0),
        ("text_config.rope_parameters.rope_theta", float("nan")),
        ("text_config.rms_norm_eps", 0),
        ("text_config.rms_norm_eps", float("nan")),
        ("text_config.rms_norm_eps", float("inf")),
        ("text_config.model_type", "qwen2"),
        ("image.patch_coder.patch_size", 10**9),
        ("image.hidden_size", 10**9),
        ("codec.image_size", 10**9),
        ("diffusion.num_train_timesteps", 10**9),
        ("diffusion.loss_weight", float("nan")),
    ],
)
def test_sizes_that_cannot_be_right_are_refused_at_once(saved, tmp_path, path, value):
    folder = shutil.copytree(saved / "all", tmp_path / "m")
    set_in(folder / "config.json", path, value)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"/m(/config.json)?\b"):
        LMFusion.from_pretrained(folder)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_a_number_of_layers_that_is_no_number_of_layers(model_type):
    """transformers makes a list of that length for some of the architectures."""
    with pytest.raises(ValueError, match="num_hidden_layers must be a whole number from 1 to 1,000, got 1000000000"):
        LMFusionConfig({"model_type": model_type, "num_hidden_layers": 10**9})
    with pytest.raises(ValueError, match="num_blocks"):
        LMFusionConfig(image={"patch_coder": {"num_blocks": 10**9}})


@pytest.mark.parametrize(
    ("path", "value"), [("base.dtype", "load"), ("base.dtype", "int8"), ("base.sha256", {}), ("files", {"../x": "0"})]
)
def test_records_that_cannot_be_right(saved, tmp_path, path, value):
    folder = shutil.copytree(saved / "image", tmp_path / "m")
    set_in(folder / "base.json", path, value)
    with pytest.raises(ValueError, match=r"base.json is damaged|tensors differ"):
        LMFusion.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "base.json"])
def test_json_that_says_a_thing_twice(saved, tmp_path, name):
    folder = shutil.copytree(saved / "all", tmp_path / "m")
    text = (folder / name).read_text().rstrip().removesuffix("}")
    key = "chat_system_prompt" if name == "config.json" else "parts"
    (folder / name).write_text(f'{text}, "{key}": "image"}}')
    with pytest.raises(ValueError, match=rf"{name} is damaged: the key '{key}' is given twice"):
        LMFusion.from_pretrained(folder)
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{name} is damaged: it is nested too deeply"):
        LMFusion.from_pretrained(folder)


def test_a_changed_tokenizer_is_noticed(saved, tmp_path):
    folder = shutil.copytree(saved / "image", tmp_path / "m")
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    for change in ({"normalizer": {"type": "Lowercase"}}, {"model": {**values["model"], "vocab": {}}}):
        file.write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=r"tokenizer.json is not the file that was saved with this model"):
            LMFusion.from_pretrained(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        LMFusion.from_pretrained(folder)


def test_a_model_saved_before_files_were_hashed_and_one_with_an_edited_template(saved, tmp_path):
    folder = shutil.copytree(saved / "image", tmp_path / "m")
    record = json.loads((folder / "base.json").read_text())
    assert set(record.pop("files")) == {"tokenizer.json"}
    (folder / "chat_template.jinja").write_text("mine")
    assert LMFusion.from_pretrained(folder).tokenizer.chat_template == "mine"
    (folder / "base.json").write_text(json.dumps(record))
    LMFusion.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(saved, tmp_path, value, dtype):
    folder = shutil.copytree(saved / "image", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors["image.norm.weight"].fill_(3e38)  # finite, though their sum is not
    save_file(tensors, folder / "model.safetensors")
    LMFusion.from_pretrained(folder)
    tensors["image.layers.1.mlp.up_proj.weight"][3, 2] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"'image.layers.1.mlp.up_proj.weight' must hold finite values"):
        LMFusion.from_pretrained(folder)


def test_weights_that_are_no_weights(saved, tmp_path):
    folder = shutil.copytree(saved / "image", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["image.norm.weight"] = tensors["image.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"'image.norm.weight' must have a dtype of .*, got int8"):
        LMFusion.from_pretrained(folder)

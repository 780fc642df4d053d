"""Paths in saved files: models load from every working directory, and moved parts can be given new paths."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from lmfusion.cli import main
from lmfusion.conversion import open_base
from lmfusion.evaluation import run as evaluation
from lmfusion.evaluation.config import EvalConfig
from lmfusion.model.modeling import LMFusion
from lmfusion.model.saved_files import saved_parts
from lmfusion.model.verification import verify
from lmfusion.training.config import RunConfig
from lmfusion.training.trainer import Trainer
from lmfusion.utils.config_values import from_values

IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "autoencoder_tiny", "channels": 1, "image_size": 8}


def make_autoencoder(folder, seed=0):
    torch.manual_seed(seed)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(in_channels=1, out_channels=1, latent_channels=2, **blocks, **counts).save_pretrained(folder)


@pytest.fixture
def place(tiny_llama, tmp_path, monkeypatch):
    """The working directory `here`, with an LLM, an autoencoder, and a model saved as `whole` and as `part`."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copytree(tiny_llama, "llm")
    make_autoencoder("vae")
    model = LMFusion.from_llm("llm", image=IMAGE, codec={**CODEC, "path": "vae"})
    model.save_pretrained("models/part")
    model.save_pretrained("models/whole", parts="all")
    return here


def elsewhere(place, monkeypatch):
    (place.parent / "there").mkdir(exist_ok=True)
    monkeypatch.chdir(place.parent / "there")


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_whole_model_loaded_by_a_relative_path_is_saved_as_its_image_part(place, monkeypatch):
    model = LMFusion.from_pretrained("models/whole")
    model.save_pretrained("run/model")
    assert Path(model.name_or_path).is_absolute()  # peft writes it into an adapter's folder
    elsewhere(place, monkeypatch)
    assert same(state(model), state(LMFusion.from_pretrained(place / "run" / "model")))
    assert same(state(model), state(LMFusion.from_pretrained("../here/run/model")))


def test_a_run_from_a_whole_model_by_a_relative_path(place, monkeypatch):
    values = {
        "output": "run",
        "model": {"adapted": "models/whole"},
        "data": {"sources": [{"kind": "digits"}], "seq_len": 128},
        "train": {"num_steps": 1, "batch_tokens": 128, "warmup_steps": 0, "peak_tflops": 1.0},
    }
    assert Trainer(from_values(RunConfig, values)).run()
    elsewhere(place, monkeypatch)
    assert json.loads((place / "run" / "model" / "base.json").read_text())["parts"] == "image"
    LMFusion.from_pretrained(place / "run" / "model")

    # The whole model, and no base LLM any more: the run's model is whole too
    shutil.rmtree(place / "llm")
    (place / "vae").rename(place / "vae2")
    monkeypatch.chdir(place)
    assert Trainer(from_values(RunConfig, {**values, "output": "second"})).run()
    elsewhere(place, monkeypatch)
    LMFusion.from_pretrained(place / "second" / "model")


@pytest.mark.parametrize("loaded", ["whole", "part"])
@pytest.mark.parametrize("parts", ["image", "all"])
def test_saving_over_the_folder_it_was_loaded_from(place, monkeypatch, loaded, parts):
    model = LMFusion.from_pretrained(f"models/{loaded}")
    model.image.marker_embedding.data.normal_()
    model.save_pretrained(f"models/{loaded}", parts=parts)
    if loaded == "whole":
        shutil.rmtree("vae")  # it has its own
    elsewhere(place, monkeypatch)
    shutil.copytree(place / "models" / loaded, "copy")
    for folder in (place / "models" / loaded, "copy"):
        again = LMFusion.from_pretrained(folder)
        assert same(state(model), state(again))
        assert (again.codec.config.path == str(Path(folder).resolve() / "codec")) == (
            loaded == "whole" or parts == "all"
        )


@pytest.mark.parametrize("parts", ["image", "all"])
@pytest.mark.parametrize("num_renames", [0, 1, 2])
def test_a_kill_while_saving_over_the_same_folder(place, monkeypatch, parts, num_renames):
    """The process dies before the first rename, between the two, and after both: then too nothing is lost."""
    shutil.rmtree("vae")
    Path("models/whole/notes.txt").write_text("mine")
    card = Path("models/whole/README.md")
    card.write_text(card.read_text() + "my own words")
    model = LMFusion.from_pretrained("models/whole")
    before = state(model)
    model.image.marker_embedding.data.normal_()
    after = state(model)

    class Killed(BaseException):
        pass

    rename, calls = os.rename, []

    def dying_rename(*names):
        if len(calls) == num_renames:
            raise Killed
        calls.append(names)
        rename(*names)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", dying_rename)
        patch.setattr("lmfusion.utils.folders.shutil.rmtree", lambda *_, **__: None)  # a kill cleans nothing up
        with pytest.raises(Killed):
            model.save_pretrained("models/whole", parts=parts)
    left = LMFusion.from_pretrained("models/whole")
    assert same(state(left), after if num_renames == 2 else before)
    left.save_pretrained("models/whole", parts=parts)
    assert same(state(LMFusion.from_pretrained("models/whole")), state(left))
    assert Path("models/whole/notes.txt").read_text() == "mine"
    assert "my own words" in card.read_text()
    assert sorted(path.name for path in Path("models").iterdir()) == ["part", "whole"]


def test_what_a_killed_save_left_is_deleted_unless_somebody_is_at_it(place):
    model = LMFusion.from_pretrained("models/part")
    abandoned = Path("models/.part.saving-999999")
    abandoned.mkdir()
    (abandoned / "model.safetensors").write_bytes(bytes(100))
    model.save_pretrained("models/part")
    assert not abandoned.exists()

    code = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY);"
        "fcntl.flock(fd, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    abandoned.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(abandoned)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        model.save_pretrained("models/part")
        assert abandoned.exists()
        holder.stdin.close()
    model.save_pretrained("models/part")
    assert not abandoned.exists()


def test_files_of_the_model_before_do_not_become_those_of_the_next(place):
    model = LMFusion.from_pretrained("models/part")
    model.tokenizer = None
    model.save_pretrained("models/part")
    assert LMFusion.from_pretrained("models/part").tokenizer is None


def test_an_autoencoder_that_has_moved(place, monkeypatch, capsys):
    Path("vae").rename("vae2")
    make_autoencoder("other", seed=1)
    with pytest.raises(FileNotFoundError, match=r"no autoencoder at .*pass codec_path="):
        LMFusion.from_pretrained("models/part")
    with pytest.raises(ValueError, match=r"made with, .*give the place of the original with codec_path="):
        LMFusion.from_pretrained("models/part", codec_path="other")
    with pytest.raises(FileNotFoundError, match="no autoencoder at"):
        LMFusion.from_pretrained("models/part", codec_path="nowhere")
    model = LMFusion.from_pretrained("models/part", codec_path="vae2")
    whole = LMFusion.from_pretrained("models/whole")
    assert same(state(model), state(whole))
    model.save_pretrained("again")
    model.save_pretrained("again_whole", parts="all")
    elsewhere(place, monkeypatch)
    for name in ("again", "again_whole"):
        assert same(state(LMFusion.from_pretrained(place / name)), state(whole))
    assert verify(place / "models" / "part", codec_path=place / "vae2").text_identical
    command = ["verify", str(place / "models" / "part")]
    assert main(command) == 2 and "codec_path=" in capsys.readouterr().err
    assert main([*command, "--codec-path", "../here/vae2"]) == 0
    command = ["generate", str(place / "models" / "part"), "a", "--num-steps", "1", "--output", "out"]
    assert main([*command, "--codec-path", "../here/vae2"]) == 0


def test_pixels_have_no_place(tiny_llama, tmp_path):
    codec = {"kind": "pixels", "channels": 1, "image_size": 4}
    LMFusion.from_llm(tiny_llama, image=IMAGE, codec=codec).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"codec_path must be left out, since .* works on pixels"):
        LMFusion.from_pretrained(tmp_path / "m", codec_path=tmp_path)


def test_a_base_that_has_moved_is_found_by_what_is_saved_next(place, monkeypatch):
    Path("llm").rename("llm2")
    model = LMFusion.from_pretrained("models/part", base="llm2")
    model.save_pretrained("again")
    whole = LMFusion.from_pretrained("models/whole")
    with pytest.raises(ValueError, match=r"the base LLM is not at .*use parts='all'"):
        whole.save_pretrained("models/whole")
    LMFusion.from_pretrained("models/whole", base="llm2").save_pretrained("again_from_whole")
    elsewhere(place, monkeypatch)
    for name in ("again", "again_from_whole"):
        assert same(state(LMFusion.from_pretrained(place / name)), state(whole))


def test_a_whole_model_and_another_base(place):
    shutil.copytree("llm", "other")
    tensors = load_file("other/model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, "other/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not the one this model was made from"):
        LMFusion.from_pretrained("models/whole", base="other")
    assert verify("models/whole", base="other").changed == ["model.norm.weight"]


def test_training_and_evaluation_of_a_model_whose_parts_have_moved(place, monkeypatch):
    Path("llm").rename("llm2")
    Path("vae").rename("vae2")
    values = {
        "output": "run",
        "model": {"adapted": "models/part", "base": "llm2", "codec_path": "vae2"},
        "data": {"sources": [{"kind": "digits"}], "seq_len": 128},
        "train": {"num_steps": 1, "batch_tokens": 128, "warmup_steps": 0, "peak_tflops": 1.0},
    }
    assert Trainer(from_values(RunConfig, values)).run()
    config = EvalConfig("eval", "models/part", base="llm2", codec_path="vae2", language={})
    model = evaluation._load(config, torch.device("cpu"))
    elsewhere(place, monkeypatch)
    trained = LMFusion.from_pretrained(place / "run" / "model")
    assert trained.base.name == model.base.name == str(place / "llm2")
    assert trained.codec.config.path == model.codec.config.path == str(place / "vae2")


def test_the_home_folder(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    elsewhere(place, monkeypatch)
    model = LMFusion.from_llm("~/llm", image=IMAGE, codec={**CODEC, "path": "~/vae"})
    model.save_pretrained("~/new")
    monkeypatch.setenv("HOME", "/nowhere")
    assert same(state(model), state(LMFusion.from_pretrained(place / "new")))
    monkeypatch.setenv("HOME", str(place))
    assert same(state(model), state(LMFusion.from_pretrained("~/new", base="~/llm", codec_path="~/vae")))
    assert not Path("~").exists()
    values = {"output": "~/run", "model": {"adapted": "~/new"}, "data": {"sources": [{"kind": "digits"}]}}
    assert from_values(RunConfig, values).output == str(place / "run")


def test_links_may_change_their_targets(place, monkeypatch):
    os.symlink("whole", "models/latest")
    os.symlink("vae", "vae_link")
    model = LMFusion.from_pretrained("models/latest")
    model.save_pretrained("of_latest")
    linked = LMFusion.from_llm("llm", image=IMAGE, codec={**CODEC, "path": "vae_link"})
    linked.save_pretrained("of_link")
    for link, target in (("models/latest", "part"), ("vae_link", "nothing")):
        os.remove(link)
        os.symlink(target, link)
    elsewhere(place, monkeypatch)
    LMFusion.from_pretrained(place / "of_latest")
    LMFusion.from_pretrained(place / "of_link")
    # What is saved through a link lands where it points, and the link stays
    model.save_pretrained(place / "models" / "latest", parts="all")
    assert (place / "models" / "latest").is_symlink()
    assert same(state(model), state(LMFusion.from_pretrained(place / "models" / "part")))


def test_a_file_that_is_a_link_keeps_its_name(tmp_path, monkeypatch):
    """As in the hub's cache, where a name ending in .gguf is a link to one without."""
    (tmp_path / "blob").write_bytes(b"no GGUF")
    os.symlink("blob", tmp_path / "model.gguf")
    monkeypatch.setattr("lmfusion.conversion.gguf.open_file", lambda path: (SimpleNamespace(vocab_size=1), None, None))
    monkeypatch.setattr("lmfusion.conversion.check_supported", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    assert open_base("model.gguf").name == str(tmp_path / "model.gguf")


def test_an_autoencoder_that_changed_since_it_was_loaded_is_not_saved(place):
    model = LMFusion.from_pretrained("models/part")
    make_autoencoder("vae", seed=1)
    with pytest.raises(OSError, match="has changed since the model was loaded"):
        model.save_pretrained("again", parts="all")
    assert not Path("again").exists()


def test_saved_parts(place):
    assert saved_parts("models/part") == "image" and saved_parts("models/whole") == "all"

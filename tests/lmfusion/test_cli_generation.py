"""The commands `lmfusion generate` and `lmfusion caption`, on a model saved to disk."""

import numpy as np
import pytest
import torch
from PIL import Image

from lmfusion.cli import main
from lmfusion.generation import caption_images, draw_images, generate_text
from lmfusion.modeling import LMFusion


@pytest.fixture(scope="module")
def saved(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = LMFusion.from_llm(
        tiny_llama,
        image={"hidden_size": 16, "patch_coder": {"kind": "linear"}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
    )
    with torch.no_grad():
        torch.nn.init.normal_(model.image.patch_coder.out_proj.weight)
    model.save_pretrained(folder)
    return folder


def test_generate_draws_what_the_library_draws(saved, tmp_path, capsys):
    arguments = [
        "--output",
        str(tmp_path / "new" / "out"),
        "--num-steps",
        "3",
        "--sampler",
        "ddim",
        "--seed",
        "4",
        "--count",
        "2",
    ]
    assert main(["generate", str(saved), "a seven", "a three", *arguments]) == 0
    model = LMFusion.from_pretrained(saved)
    expected = draw_images(model, ["a seven"] * 2 + ["a three"] * 2, num_steps=3, sampler="ddim", seed=4)
    files = sorted((tmp_path / "new" / "out").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    for file, image in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(image))
    assert capsys.readouterr().out.splitlines()[3] == f"{files[3]}\ta three"


def test_generate_writes_text(saved, capsys):
    assert main(["generate", str(saved), "one", "--text", "--max-new-tokens", "5"]) == 0
    answer = generate_text(LMFusion.from_pretrained(saved), ["one"], max_new_tokens=5)[0]
    assert capsys.readouterr().out == "one" + answer + "\n"


def test_caption_describes_files(saved, tmp_path, capsys):
    Image.fromarray(np.full((20, 10), 77, np.uint8)).save(tmp_path / "grey.png")
    path = str(tmp_path / "grey.png")
    assert main(["caption", str(saved), path, "--prompt", "it is", "--max-new-tokens", "4"]) == 0
    caption = caption_images(LMFusion.from_pretrained(saved), [path], prompt="it is", max_new_tokens=4)[0]
    assert capsys.readouterr().out == f"{path}\tit is {caption}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{saved}", "x", "--guidance-scale", "nan"], "guidance_scale is nan"),
        (["generate", "{saved}", "x", "--num-steps", "0"], "num_steps is 0"),
        (["generate", "{saved}", "x", "--sampler", "euler"], "unknown sampler 'euler'"),
        (["generate", "{saved}", "x", "--count", "0"], "--count is 0"),
        (["generate", "{saved}", "x", "--chat"], "add --text"),
        (["generate", "{saved}", "x", "--temperature", "0.5"], "--temperature is about text"),
        (["generate", "{saved}", "x", "--text", "--num-steps", "5"], "--num-steps is about drawing"),
        (["generate", "{saved}", ""], "caption is empty"),
        (["generate", "nowhere", "x"], "no saved model at nowhere"),
        (["caption", "{saved}", "nowhere.png"], "nowhere.png"),
        (["caption", "{saved}", "{saved}/config.json"], "not an image of a known format"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(saved, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(saved=saved) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lmfusion: error: ") and message in error.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["generate", "x"], ["caption", "x.png"]])
def test_cuda_asked_for_and_absent(saved, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main([command[0], str(saved), command[1], "--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_full_disk_is_named_and_keeps_the_old_image(saved, tmp_path, monkeypatch, capsys):
    (tmp_path / "0000.png").write_bytes(b"old")

    def no_space(self, path, format):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_space)
    assert main(["generate", str(saved), "x", "--num-steps", "1", "--output", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("0000.png", b"old")]


@pytest.mark.parametrize("command", ["generate", "caption"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"lmfusion {command} runs/" in capsys.readouterr().out

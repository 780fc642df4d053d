"""The commands `lmfusion generate` and `lmfusion caption`, on a model saved to disk."""

import os
import pty
import re
import signal
import termios

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from lmfusion.cli import main
from lmfusion.generation import Engine
from lmfusion.images.png import read_settings, save_png
from lmfusion.model.modeling import LMFusion

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def saved(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = LMFusion.from_llm(
        tiny_llama,
        image={"hidden_size": 16, "patch_coder": {"kind": "linear"}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
    )
    model.tokenizer.chat_template = TEMPLATE
    with torch.no_grad():
        torch.nn.init.normal_(model.image.patch_coder.out_proj.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved):
    return LMFusion.from_pretrained(saved)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photo(here):
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(20, 10)).save(here / "photo.png")
    return "photo.png"


def generate(saved, *arguments):
    return main(["generate", str(saved), *arguments])


def assert_same(file, image):
    np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(image))


# --- drawing ---


def test_draws_what_the_library_draws(saved, model, here, capsys):
    options = ["--num-steps", "3", "--sampler", "ddim", "--seed", "4", "--count", "2", "--batch-size", "3"]
    assert generate(saved, "a seven", "a three", "--output", "new/out", *options) == 0
    expected = model.draw(["a seven"] * 2 + ["a three"] * 2, num_steps=3, sampler="ddim", seed=4)
    files = sorted((here / "new" / "out").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    for file, image in zip(files, expected, strict=True):
        assert_same(file, image)
    assert capsys.readouterr().out.splitlines()[3] == "new/out/0003.png\ta three"


def test_every_option_of_images_arrives(saved, model, photo, here):
    options = ["--guidance-scale", "3", "--image-guidance-scale", "1.5", "--guidance-interval", "0.1", "0.9"]
    options += ["--guidance-rescale", "0.5", "--negative-prompt", "a one", "--image-size", "16", "--num-steps", "4"]
    assert generate(saved, "thinner", "--image", photo, "--image", photo, "--sampler", "dpm-solver", *options) == 0
    asked = {
        "guidance_scale": 3.0,
        "image_guidance_scale": 1.5,
        "guidance_interval": (0.1, 0.9),
        "guidance_rescale": 0.5,
        "negative_prompt": "a one",
        "image_size": 16,
        "num_steps": 4,
        "sampler": "dpm-solver",
    }
    settings = read_settings("drawings/0000.png")
    assert {name: settings[name] for name in asked} == {**asked, "guidance_interval": [0.1, 0.9]}
    assert settings["prompt"] == "thinner" and settings["prompt_images"] == [photo, photo]
    assert_same("drawings/0000.png", model.draw([["thinner", here / photo, here / photo]], **asked)[0])


def test_the_png_says_how_it_was_made(saved, here):
    assert generate(saved, "a seven", "a three", "--num-steps", "2", "--seed", "9") == 0
    settings = read_settings("drawings/0001.png")
    known = {"prompt": "a three", "seed": 9, "num_steps": 2, "sampler": "ddpm", "index": 1, "image": 0, "chat": False}
    assert {name: settings[name] for name in known} == known


def test_settings_draw_the_image_again(saved, here, capsys):
    arguments = ["--num-steps", "2", "--seed", "9", "--guidance-scale", "2", "--guidance-interval", "0.2", "0.9"]
    assert generate(saved, "a seven", "a three", *arguments) == 0
    assert generate(saved, "--settings", "drawings/0001.png") == 0
    assert (here / "drawings/0002.png").read_bytes() == (here / "drawings/0001.png").read_bytes()
    assert generate(saved, "--settings", "drawings/0001.png", "--seed", "10", "--output", "others") == 0
    assert read_settings("others/0000.png") == {**read_settings("drawings/0001.png"), "seed": 10}
    assert (here / "others/0000.png").read_bytes() != (here / "drawings/0001.png").read_bytes()
    assert capsys.readouterr().out.splitlines()[2:] == ["drawings/0002.png\ta three", "others/0000.png\ta three"]


def test_previews_are_saved_where_asked_for(saved, here):
    assert generate(saved, "x", "--num-steps", "4", "--preview-every", "2") == 0
    assert sorted(path.name for path in (here / "drawings").iterdir()) == ["0000.png", "0000.step0002.png"]


# --- text ---


def test_text_goes_on_from_the_prompt(saved, model, capsys):
    assert generate(saved, "one", "two", "--text", "--max-new-tokens", "5") == 0
    first, second = (answer.text for answer in model.generate(["one", "two"], max_new_tokens=5))
    assert capsys.readouterr().out == f"one{first}\ntwo{second}\n"


def test_every_option_of_writing_arrives(saved, model, capsys):
    chance = ["--temperature", "0.9", "--top-p", "0.9", "--top-k", "40", "--seed", "3"]
    assert generate(saved, "one", "--text", "--max-new-tokens", "20", "--count", "2", *chance) == 0
    asked = {"max_new_tokens": 20, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 3}
    texts = [answer.text for answer in model.generate(["one"] * 2, **asked)]
    assert capsys.readouterr().out == "".join(f"one{text}\n" for text in texts)
    stop = texts[0][5:7]
    assert generate(saved, "one", "--text", "--max-new-tokens", "20", *chance, "--stop", "zz", "--stop", stop) == 0
    assert capsys.readouterr().out == f"one{texts[0][: texts[0].index(stop)]}\n"


def test_a_chat_without_images(saved, model, photo, here, capsys):
    assert generate(saved, "What is it?", "--chat", "--text", "--image", photo, "--max-new-tokens", "6") == 0
    answer = model.generate([[here / photo, "What is it?"]], chat=True, max_new_tokens=6)[0]
    assert capsys.readouterr().out == answer.text.strip() + "\n"
    assert not (here / "drawings").exists()


def test_a_chat_answers_with_text_and_images(saved, model, here, capsys):
    options = ["--min-images", "2", "--max-images", "3", "--max-new-tokens", "6", "--num-steps", "2"]
    assert generate(saved, "Draw.", "--chat", *options) == 0
    answer = model.generate(["Draw."], chat=True, min_images=2, max_images=3, max_new_tokens=6, num_steps=2)[0]
    texts = [part.strip() for part in answer.parts if isinstance(part, str)]
    files = [f"drawings/000{i}.png" for i in range(len(answer.images))]
    assert len(files) >= 2
    for file, image in zip(files, answer.images, strict=True):
        assert_same(file, image)
    shown = capsys.readouterr().out
    assert [shown.index(file) for file in files] == sorted(shown.index(file) for file in files)
    assert all(text in shown for text in texts)
    assert read_settings(files[1])["image"] == 1
    assert generate(saved, "--settings", files[1], "--output", "again") == 0
    assert_same("again/0001.png", answer.images[1])


# --- as it happens ---


def test_text_and_images_are_there_before_the_end(saved, here, monkeypatch, capsys):
    """Looked at after each step of the engine, nothing that was printed before is missing."""
    step, seen = Engine.step, []

    def watched(self):
        seen.append((capsys.readouterr().out, sorted(path.name for path in here.glob("drawings/*.png"))))
        return step(self)

    monkeypatch.setattr(Engine, "step", watched)
    options = ["--chat", "--min-images", "2", "--max-new-tokens", "8", "--num-steps", "2"]
    assert generate(saved, "Draw.", *options) == 0
    texts = [out for out, _ in seen if out]
    assert len(texts) >= 3
    first_file = next(i for i, (_, files) in enumerate(seen) if files)
    assert "drawings/0000.png\n" in seen[first_file][0]


def interrupting(monkeypatch, before_step):
    """Ctrl-C within a step of the engine."""
    step, count = Engine.step, iter(range(1_000_000))

    def interrupted(self):
        if next(count) == before_step:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)


def test_ctrl_c_keeps_what_was_finished(saved, here, monkeypatch, capsys):
    interrupting(monkeypatch, before_step=5)
    assert generate(saved, "one", "two", "three", "--num-steps", "2", "--batch-size", "1") == 130
    out, err = capsys.readouterr()
    files = sorted(path.name for path in (here / "drawings").iterdir())
    assert 0 < len(files) < 3
    assert out.splitlines() == [
        f"drawings/{file}\t{prompt}" for file, prompt in zip(files, ("one", "two"), strict=False)
    ]
    assert err.splitlines()[-1] == f"lmfusion: interrupted; finished images are in drawings: {len(files)}"


def test_ctrl_c_in_the_step_that_finishes_an_image_keeps_it(saved, here, monkeypatch):
    for before_step in range(8):
        with monkeypatch.context() as patch:
            interrupting(patch, before_step)
            code = generate(saved, "one", "--num-steps", "2", "--output", f"at{before_step}")
        if code == 0:
            break
    assert code == 0 and (here / f"at{before_step}" / "0000.png").exists()


def test_a_terminal_shows_a_bar(saved, here, monkeypatch):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    os.set_blocking(leader, False)
    with os.fdopen(follower, "w") as terminal, os.fdopen(leader, "rb") as reader:
        monkeypatch.setattr("sys.stderr", terminal)
        assert generate(saved, "one", "--num-steps", "40") == 0
        seen = reader.read().decode()
    assert "0000.png" in seen and "/40 [" in seen


def test_verbose_tells_memory_and_counts(saved, here, capsys):
    assert generate(saved, "one", "--num-steps", "2", "--verbose") == 0
    err = capsys.readouterr().err
    assert "key-value cache" in err and "prompt tokens, 0 text tokens, 1 images" in err


# --- captions ---


def test_caption_describes_files(saved, model, here, capsys):
    paths = []
    for i in range(3):
        paths.append(f"{i}.png")
        Image.fromarray(np.full((20, 10), 70 * i, np.uint8)).save(paths[-1])
    options = ["--prompt", "it is", "--max-new-tokens", "4", "--temperature", "0.8", "--batch-size", "2"]
    assert main(["caption", str(saved), *paths, *options]) == 0
    captions = model.caption(paths, prompt="it is", max_new_tokens=4, temperature=0.8)
    expected = [f"{path}\tit is {caption}" for path, caption in zip(paths, captions, strict=True)]
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in expected)


def test_captions_appear_before_all_are_finished(saved, photo, capsys):
    assert main(["caption", str(saved), photo, "nowhere.png", "--batch-size", "1", "--max-new-tokens", "2"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{photo}\t") and "nowhere.png" in err


def test_ctrl_c_among_captions(saved, photo, monkeypatch, capsys):
    interrupting(monkeypatch, before_step=2)
    assert main(["caption", str(saved), photo, "--max-new-tokens", "8"]) == 130
    assert "interrupted" in capsys.readouterr().err


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("x --guidance-scale nan", "guidance_scale must be between 0 and 1,000, got nan"),
        ("x --num-steps 0", "num_steps must be at least 1, got 0"),
        ("x --sampler euler", "sampler must be one of ddpm, ddim, dpm-solver"),
        ("x --count 0", "--count must be at least 1, got 0"),
        ("x --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("x --seed -1", "seed must be at least 0, got -1"),
        ("x --image-size 9", "multiples of the patch size 2, got 9 x 9"),
        ("x --image nowhere.png", "nowhere.png"),
        ("x --image {saved}/config.json", "not an image of a known format"),
        ("x --temperature 0.5", "--temperature needs text in the answer; add --text or --chat"),
        ("x --stop y", "--stop needs text in the answer"),
        ("x --max-images 2", "--max-images needs an answer of text and images; add --chat"),
        ("x --image-guidance-scale 2", "add --image"),
        ("x --guidance-scale 1 --negative-prompt y", "--negative-prompt needs guidance"),
        ("x --guidance-scale 1 --guidance-interval 0 0.5", "--guidance-interval needs guidance"),
        ("x --text --num-steps 5", "--num-steps needs images in the answer"),
        ("x --text --output y", "--output needs images in the answer"),
        ("x --text --min-images 0", "--min-images needs an answer of text and images"),
        ("x --text --top-p 0.5", "add --temperature"),
        ("x --text --count 2", "--count must be 1 without random sampling, got 2"),
        ("x --chat --max-images 0 --sampler ddim", "--sampler needs images in the answer"),
        ("x --chat --min-images 9", "raise max_images"),
        ("x --chat --max-images 10000000 --image-guidance-scale 2", "max_images must be at most 16 here"),
        ("--num-steps 3", "a PROMPT must be given"),
        ("x --settings y.png", "PROMPT must not be given with --settings"),
        ("--settings y.png --chat", "--chat must not be given with --settings"),
        ("--settings y.png --count 2", "leave out --count"),
        ("--settings nowhere.png", "nowhere.png"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(saved, here, capsys, arguments, message):
    assert generate(saved, *arguments.format(saved=saved).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("lmfusion: error: ") and message in error.splitlines()[-1]


RECORDED = {"prompt": "x", "prompt_images": [], "chat": False, "index": 0, "draw_first": True, "max_images": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "lack 'prompt'"),
        ({**RECORDED, "prompt": 7}, "prompt must be a str, got 7"),
        ({**RECORDED, "prompt_images": [7]}, "prompt_images texts, got 0 and [7]"),
        ({**RECORDED, "index": -1}, "index must be at least 0 and prompt_images texts, got -1"),
        ({**RECORDED, "draw_first": [1]}, "draw_first"),
        ({**RECORDED, "num_steps": "7"}, "num_steps"),
        ({**RECORDED, "guidance_scale": "7"}, "cannot be used"),
        ({**RECORDED, "guidance_interval": 7}, "cannot be used"),
        ({**RECORDED, "negative_prompt": 7}, "negative_prompt"),
        ({**RECORDED, "image_size": "8"}, "image_size"),
        ({**RECORDED, "sampler": "EulerDiscreteScheduler"}, "sampler must be one of"),
    ],
)
def test_settings_of_others_are_looked_at(saved, here, capsys, settings, message):
    save_png("a.png", Image.new("L", (8, 8)), settings)
    assert generate(saved, "--settings", "a.png") == 2
    assert message in capsys.readouterr().err


def test_a_png_without_settings(saved, photo, capsys):
    assert generate(saved, "--settings", photo) == 2
    assert "photo.png must hold settings" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["generate", "nowhere", ""], ["generate", "nowhere", "x"]])
def test_no_model(here, capsys, arguments):
    assert main(arguments) == 2
    assert re.search(r"no saved model at \S*nowhere: ", capsys.readouterr().err)


def test_an_empty_caption(saved, here, capsys):
    assert generate(saved, "") == 2
    assert "empty" in capsys.readouterr().err


def test_a_model_that_knows_no_chat(saved, model, here, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    for file in folder.glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(folder)
    assert generate(folder, "x", "--chat") == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["generate", "x"], ["caption", "x.png"]])
def test_cuda_requested_and_absent(saved, here, capsys, command):
    assert main([command[0], str(saved), command[1], "--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_a_full_disk_is_named_and_keeps_the_old_image(saved, tmp_path, monkeypatch, capsys):
    (tmp_path / "0000.png").write_bytes(b"old")

    def no_space(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_space)
    assert generate(saved, "x", "--num-steps", "1", "--output", str(tmp_path)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("0000.png", b"old")]


@pytest.mark.parametrize("command", ["generate", "caption"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"lmfusion {command} runs/" in capsys.readouterr().out

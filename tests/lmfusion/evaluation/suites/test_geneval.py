"""Images lie where GenEval's script looks for them, and are generated once."""

import json
import re

import pytest
from PIL import Image

from lmfusion import LMFusion
from lmfusion.evaluation.suites.geneval import GenEvalConfig, GenEvalSuite
from lmfusion.images.png import read_settings
from lmfusion.utils.config_values import from_values

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return LMFusion.from_llm(
        str(tiny_llama),
        image={"patch_coder": {"kind": "linear", "patch_size": 2}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
    ).eval()


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return GenEvalConfig(str(file), num_images=2, num_steps=2, seed=5)


def scored_by_geneval(folder):
    """The files that GenEval's evaluate_images.py looks at: (prompt of the folder, name of the image)."""
    found = []
    for subfolder in sorted(folder.iterdir()):
        if subfolder.is_dir() and subfolder.name.isdigit():
            metadata = json.loads((subfolder / "metadata.jsonl").read_text())
            for file in sorted((subfolder / "samples").iterdir()):
                if re.match(r"\d+\.png", file.name):
                    Image.open(file).load()
                    found.append((metadata["prompt"], file.name))
    return found


def test_layout(model, config, tmp_path):
    folder = tmp_path / "out"
    result = GenEvalSuite(config).run(model, folder)
    assert scored_by_geneval(folder) == [(line["prompt"], f"000{k}.png") for line in LINES for k in range(2)]
    assert [path.name for path in sorted(folder.iterdir())] == ["00000", "00001", "00002"]
    assert [json.loads((folder / f"0000{i}/metadata.jsonl").read_text()) for i in range(3)] == LINES
    assert [(score.name, score.value) for score in result.scores] == [("prompts", 3), ("images", 6)]
    assert all("GenEval's own" in score.details["to be scored by"] for score in result.scores)
    assert result.tables[0].rows == (("single_object", "2", "4"), ("counting", "1", "2"))
    assert [picture.caption.split(":")[0] for picture in result.pictures] == ["single_object"] * 2 + ["counting"] * 2
    assert all((folder / picture.file).is_file() for picture in result.pictures)


def test_images_are_those_of_their_seeds(model, config, tmp_path):
    GenEvalSuite(config).run(model, tmp_path / "out")
    settings = read_settings(tmp_path / "out/00001/samples/0001.png")
    assert (settings["prompt"], settings["seed"], settings["index"]) == (LINES[1]["prompt"], 6, 1)
    expected = model.draw([LINES[1]["prompt"]] * 2, seed=6, num_steps=2, sampler="ddpm", guidance_scale=1.55)[1]
    assert Image.open(tmp_path / "out/00001/samples/0001.png").tobytes() == expected.tobytes()


def test_a_killed_run_continues(model, config, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    GenEvalSuite(config).run(model, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    (folder / "00001/samples/0001.png").unlink()
    (folder / "00002/samples/0000.png").write_bytes(b"damaged")
    prompted = []
    draw = LMFusion.draw
    monkeypatch.setattr(LMFusion, "draw", lambda *args, **options: prompted.append(args[1]) or draw(*args, **options))
    result = GenEvalSuite(config).run(model, folder)
    assert prompted == [[LINES[1]["prompt"]] * 2, [LINES[2]["prompt"]] * 2]
    assert result.scores[1].details["generated now"] == 4
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before
    prompted.clear()
    GenEvalSuite(from_values(GenEvalConfig, {**vars(config), "num_steps": 3})).run(model, folder)
    assert len(prompted) == 3


def test_images_of_another_export_are_refused(model, config, tmp_path):
    folder = tmp_path / "out"
    GenEvalSuite(config).run(model, folder)
    with pytest.raises(ValueError, match=r"must hold only the images of this export, got .*00002, which"):
        GenEvalSuite(from_values(GenEvalConfig, {**vars(config), "num_prompts": 2})).run(model, folder)
    with pytest.raises(ValueError, match=r"got .*samples/0001\.png, which GenEval would count too"):
        GenEvalSuite(from_values(GenEvalConfig, {**vars(config), "num_images": 1})).run(model, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have at least 1 prompts, got 0"),
        ("{", "line 1 must be a JSON object"),
        ('{"prompt": "a dog"}', "line 1 must be"),
        ('{"tag": "x", "include": [], "prompt": " "}', "line 1 must be"),
        ("[]", "line 1 must be"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, text, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        GenEvalSuite(GenEvalConfig(str(file))).check()


def test_a_missing_file_is_named_before_anything_is_generated(tmp_path):
    with pytest.raises(
        ValueError, match=r"must be an existing file, got .*none.jsonl; give prompts/evaluation_metadata\.jsonl"
    ):
        GenEvalSuite(GenEvalConfig(str(tmp_path / "none.jsonl"))).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_images": 0}, r"geneval\.num_images must be at least 1, got 0"),
        ({"num_prompts": 0}, r"geneval\.num_prompts must be at least 1, got 0"),
        ({"seed": -1}, r"geneval\.seed must be at least 0, got -1"),
        ({"num_steps": 0}, "num_steps"),
        ({"sampler": "fast"}, "sampler"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_values(GenEvalConfig, {"prompts": "prompts.jsonl", **values}, "geneval")

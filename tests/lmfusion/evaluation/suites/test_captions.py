"""Are captions written once, scored against all references, and shown?"""

import json
from dataclasses import replace

import pytest
from PIL import Image

from lmfusion import LMFusion
from lmfusion.evaluation.suites.captions import FILE, CaptionsConfig, check_captions, run_captions, scores_of
from lmfusion.utils.config_values import from_values

DIGITS = {"kind": "digits", "split": "test"}


@pytest.fixture
def config():
    return from_values(CaptionsConfig, {"source": DIGITS, "num_images": 5, "max_new_tokens": 4, "num_shown": 2})


@pytest.fixture
def captioned(monkeypatch):
    """How many images the model was asked for, and captions that are the same every time."""
    asked = []

    def caption(self, images, **options):
        asked.append(len(images))
        return ["a handwritten seven"] * len(images)

    monkeypatch.setattr(LMFusion, "caption", caption)
    return asked


def test_the_model_writes_what_is_scored(tiny, config, tmp_path):
    result = run_captions(tiny, config, tmp_path)
    assert [score.name for score in result.scores] == ["CIDEr-D", "BLEU-4", "ROUGE-L", "exact match"]
    assert all(score.low <= score.value <= score.high and score.count == 5 for score in result.scores)
    assert len(result.pictures) == 2
    assert all((tmp_path / picture.file).is_file() for picture in result.pictures)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert len(lines) == 6
    assert lines[1]["references"][0].startswith("a handwritten")


def test_captions_that_are_there_are_kept(tiny, config, tmp_path, captioned):
    first = run_captions(tiny, config, tmp_path)
    assert captioned == [5]
    file = tmp_path / FILE
    text = file.read_text()
    file.write_text(text[: text.rindex("\n", 0, -1) + 20])  # the last line is cut, as by a crash
    second = run_captions(tiny, config, tmp_path)
    assert captioned == [5, 1]
    assert second.scores == first.scores
    assert file.read_text() == text
    file.write_bytes(b"\xff" + text.encode()[1:])
    assert run_captions(tiny, config, tmp_path).scores == first.scores
    assert captioned == [5, 1, 5]
    other = from_values(CaptionsConfig, {"source": DIGITS, "num_images": 5, "prompt": "a picture of"})
    run_captions(tiny, other, tmp_path)
    assert captioned == [5, 1, 5, 5]
    assert json.loads(file.read_text().splitlines()[1])["caption"] == "a picture of a handwritten seven"


def test_a_smaller_run_keeps_the_captions_of_a_larger_one(tiny, config, tmp_path, captioned):
    for num_images in (5, 2, 5):
        run_captions(tiny, replace(config, num_images=num_images), tmp_path)
    assert captioned == [5]


def test_captions_of_another_folder_are_not_kept(tiny, tmp_path, captioned):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "same.png")
        (tmp_path / folder / "same.txt").write_text("a square")
        source = {"kind": "folder", "path": str(tmp_path / folder)}
        run_captions(tiny, from_values(CaptionsConfig, {"source": source}), tmp_path / "out")
    assert captioned == [1, 1]


def test_exact_matches_are_of_any_reference():
    references = [["one dog", "a dog"], ["a cat"], ["a bird"], ["a fish"]]
    scores = {score.name: score for score in scores_of(["a dog", "a cat", "a cat", "a fish "], references)}
    assert scores["exact match"].value == 0.5
    assert scores["exact match"].details["references an image"] == 1.25


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "either source"),
        ({"source": DIGITS, "coco": {"annotations": "a", "images": "b"}}, "either source"),
        ({"source": DIGITS, "max_new_tokens": 0}, "captions.max_new_tokens must be at least 1, got 0"),
    ],
)
def test_bad_settings(values, reason):
    with pytest.raises(ValueError, match=reason):
        from_values(CaptionsConfig, values)


def test_no_more_images_than_there_are(tiny, tmp_path):
    config = from_values(CaptionsConfig, {"source": DIGITS, "num_images": 100000})
    for call in (lambda: check_captions(config), lambda: run_captions(tiny, config, tmp_path)):
        with pytest.raises(ValueError, match="num_images is 100000, but there are"):
            call()

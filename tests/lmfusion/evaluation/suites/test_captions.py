"""Captions are generated once, scored against all references, and shown."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from lmfusion import LMFusion
from lmfusion.evaluation.suites.captions import FILE, CaptionsConfig, CaptionsSuite, scores_of
from lmfusion.utils.config_values import from_values

DIGITS = {"kind": "digits", "split": "test"}


@pytest.fixture
def config():
    return from_values(CaptionsConfig, {"source": DIGITS, "num_images": 5, "max_new_tokens": 4, "num_shown": 2})


@pytest.fixture
def captioned(monkeypatch):
    """Counts the images of each call, and makes the same caption for all of them."""
    counts = []

    def caption(self, images, **options):
        counts.append(len(images))
        return ["a handwritten seven"] * len(images)

    monkeypatch.setattr(LMFusion, "caption", caption)
    return counts


def test_the_captions_of_the_model_are_scored(tiny, config, tmp_path):
    result = CaptionsSuite(config).run(tiny, tmp_path)
    assert [score.name for score in result.scores] == ["CIDEr-D", "BLEU-4", "ROUGE-L", "exact match"]
    assert all(score.low <= score.value <= score.high and score.count == 5 for score in result.scores)
    assert len(result.pictures) == 2
    assert all((tmp_path / picture.file).is_file() for picture in result.pictures)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert len(lines) == 6
    assert lines[1]["references"][0].startswith("a handwritten")


def test_existing_captions_are_kept(tiny, config, tmp_path, captioned):
    first = CaptionsSuite(config).run(tiny, tmp_path)
    assert captioned == [5]
    file = tmp_path / FILE
    text = file.read_text()
    file.write_text(text[: text.rindex("\n", 0, -1) + 20])  # the last line is truncated, as by a crash
    second = CaptionsSuite(config).run(tiny, tmp_path)
    assert captioned == [5, 1]
    assert second.scores == first.scores
    assert file.read_text() == text
    file.write_bytes(b"\xff" + text.encode()[1:])
    assert CaptionsSuite(config).run(tiny, tmp_path).scores == first.scores
    assert captioned == [5, 1, 5]
    other = from_values(CaptionsConfig, {"source": DIGITS, "num_images": 5, "prompt": "a picture of"})
    CaptionsSuite(other).run(tiny, tmp_path)
    assert captioned == [5, 1, 5, 5]
    assert json.loads(file.read_text().splitlines()[1])["caption"] == "a picture of a handwritten seven"


def test_a_smaller_run_keeps_the_captions_of_a_larger_one(tiny, config, tmp_path, captioned):
    for num_images in (5, 2, 5):
        CaptionsSuite(replace(config, num_images=num_images)).run(tiny, tmp_path)
    assert captioned == [5]


def test_captions_of_another_folder_are_not_kept(tiny, tmp_path, captioned):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "same.png")
        (tmp_path / folder / "same.txt").write_text("a square")
        source = {"kind": "folder", "path": str(tmp_path / folder)}
        CaptionsSuite(from_values(CaptionsConfig, {"source": source})).run(tiny, tmp_path / "out")
    assert captioned == [1, 1]


def test_an_exact_match_may_be_with_any_reference():
    references = [["one dog", "a dog"], ["a cat"], ["a bird"], ["a fish"]]
    scores = {score.name: score for score in scores_of(["a dog", "a cat", "a cat", "a fish "], references)}
    assert scores["exact match"].value == 0.5
    assert scores["exact match"].details["references per image"] == 1.25


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


def test_too_many_images_are_refused(tiny, tmp_path):
    config = from_values(CaptionsConfig, {"source": DIGITS, "num_images": 100000})
    for call in (lambda: CaptionsSuite(config).check(), lambda: CaptionsSuite(config).run(tiny, tmp_path)):
        with pytest.raises(ValueError, match=r"captions.num_images must be at most 359, .* got 100000"):
            call()

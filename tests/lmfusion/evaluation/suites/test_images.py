"""Images are generated once, with noise by prompt alone, and compared with the right images."""

import json

import numpy as np
import pytest
from PIL import Image

from lmfusion.evaluation.metrics.extractors import FeatureExtractor
from lmfusion.evaluation.metrics.feature_distances import frechet_distance
from lmfusion.evaluation.suites import images
from lmfusion.evaluation.suites.images import ImagesConfig, ImagesSuite, generate_images, read_prompts
from lmfusion.images.png import read_settings
from lmfusion.utils.config_values import from_values
from tests.lmfusion.evaluation.metrics.clip_folder import save_clip

DIGITS = {"kind": "digits", "split": "test"}
FAST = {"num_images": 8, "sampler": "dpm-solver", "num_steps": 2}


@pytest.fixture
def means(monkeypatch):
    """Instead of networks, one whose two features are the mean and the deviation of the pixels."""
    seen = []

    def features(self, given):
        arrays = [np.asarray(image.convert("L"), np.float64) for image in given]
        seen.append(arrays)
        return np.array([[array.mean(), array.std()] for array in arrays])

    monkeypatch.setattr(FeatureExtractor, "features", features)
    extractor = FeatureExtractor("means", "FID", "0", 8, "none", "none", 2, 4, lambda image: None, lambda batch: batch)
    monkeypatch.setattr(images, "load_extractor", lambda config, device="cpu": extractor)
    return seen


def test_generated_and_real_images_are_compared(tiny, tmp_path, means):
    values = {**FAST, "source": DIGITS, "extractors": [{}], "guidance_scales": [1, 2], "control": {"kind": "digits"}}
    result = ImagesSuite(from_values(ImagesConfig, values)).run(tiny, tmp_path)
    real, first, _, others = means
    assert len(real) == len(first) == len(others) == 8
    assert real[0].shape == (8, 8)
    names = ["FID, guidance 1", "KID, guidance 1", "FID, guidance 2", "KID, guidance 2"]
    assert [score.name for score in result.scores[:4]] == names
    assert "of other real images" in result.scores[4].name
    fid, kid = result.scores[0], result.scores[1]
    pairs = [np.array([[a.mean(), a.std()] for a in arrays]) for arrays in (first, real)]
    assert fid.value == pytest.approx(frechet_distance(*pairs))
    assert fid.low is None
    assert kid.low < kid.value < kid.high
    assert fid.count == 8
    assert fid.details["extractor"] == "means"
    assert fid.details["real images"] == 8
    assert fid.details["guidance"] == 1
    assert (tmp_path / result.pictures[0].file).is_file()
    made = [read_settings(tmp_path / f"guidance-{scale}" / "000007.png") for scale in (1, 2)]
    assert [settings["guidance_scale"] for settings in made] == [1, 2]
    assert made[0]["prompt"] == made[1]["prompt"]


def test_the_interval_of_the_kernel_distance_covers_what_other_samples_give(means):
    extractor = images.load_extractor(None)
    generator = np.random.default_rng(0)
    real = generator.normal(size=(2000, 2))
    truth = images.distances(extractor, generator.normal(0.7, 1, size=(2000, 2)), real, "", {})[1].value
    covered = 0
    for _ in range(20):
        generated = generator.normal(0.7, 1, size=(60, 2))
        score = images.distances(extractor, generated, generator.normal(size=(60, 2)), "", {})[1]
        covered += score.low <= truth <= score.high
    assert covered >= 16  # 19 are expected; below 16 one time in 400


def test_existing_images_are_not_generated_again(tiny, tmp_path):
    prompts = ["a seven", "an eight", "a nine"]
    options = from_values(ImagesConfig, {**FAST, "source": DIGITS}).options(2.0)
    files = generate_images(tiny, prompts, options, tmp_path, 2, "digest")
    assert read_settings(files[1])["prompt"] == "an eight"
    before = [file.stat().st_mtime_ns for file in files]
    pixels = np.asarray(Image.open(files[1]))
    files[1].unlink()
    files[2].write_bytes(b"damaged")
    assert generate_images(tiny, prompts, options, tmp_path, 8, "digest") == files
    assert files[0].stat().st_mtime_ns == before[0]
    assert np.array_equal(np.asarray(Image.open(files[1])), pixels)  # in any batch
    assert read_settings(files[2])["index"] == 2
    generate_images(tiny, prompts, options, tmp_path, 8, "another model")
    assert files[0].stat().st_mtime_ns != before[0]


def test_prompts_from_files_and_the_clip_score(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a cat"}) + "\n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a cat", "a dog"]
    assert read_prompts(str(tmp_path / "prompts.jsonl")) == ["a cat"]
    (tmp_path / "mark.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "mark.txt")) == ["a cat"]
    (tmp_path / "latin.txt").write_text("ein Bär\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"latin.txt must be UTF-8"):
        read_prompts(str(tmp_path / "latin.txt"))
    values = {**FAST, "prompts": str(tmp_path / "prompts.txt"), "num_images": None}
    values["clip"] = str(save_clip(tmp_path / "clip"))
    config = from_values(ImagesConfig, values)
    ImagesSuite(config).check()
    [score] = ImagesSuite(config).run(tiny, tmp_path / "out").scores
    assert score.name == "CLIP score, guidance 1.55"
    assert score.count == 2
    assert 0 <= score.low <= score.value <= score.high <= 100
    with pytest.raises(ValueError, match=r"images.num_images must be at most 2, the prompts of .* got 3"):
        ImagesSuite(from_values(ImagesConfig, {**values, "num_images": 3})).check()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "images must have prompts, got none"),
        ({"source": DIGITS, "coco": {"annotations": "a", "images": "b"}}, "source or coco, got both"),
        ({"prompts": "a.txt", "extractors": [{}]}, "need real images to compare with"),
        ({"source": DIGITS, "control": DIGITS}, "needs images.extractors"),
        ({"source": DIGITS, "guidance_scales": [1, 1]}, r"one or more different numbers, got \[1"),
        ({"source": DIGITS, "guidance_scales": []}, r"one or more different numbers, got \[\]"),
        ({"source": DIGITS, "guidance_scales": [-1]}, "guidance_scale"),
        ({"source": DIGITS, "sampler": "magic"}, "images.sampler must be one of .* got 'magic'"),
        ({"source": DIGITS, "num_steps": 5000}, "images.num_steps must be at most 1000 here, got 5000"),
        ({"source": DIGITS, "num_images": 1}, "images.num_images must be at least 2, got 1"),
    ],
)
def test_bad_settings(values, reason):
    with pytest.raises(ValueError, match=reason):
        from_values(ImagesConfig, values)


def test_errors_name_what_is_missing(tmp_path):
    weights = [{"kind": "inception", "path": str(tmp_path / "none.pth")}]
    with pytest.raises(ValueError, match=r"none\.pth.*torch-fidelity/releases"):
        ImagesSuite(from_values(ImagesConfig, {"source": DIGITS, "extractors": weights})).check()
    with pytest.raises(ValueError, match=r"images\.clip.*huggingface\.co"):
        ImagesSuite(from_values(ImagesConfig, {"source": DIGITS, "clip": str(tmp_path / "none")})).check()
    for name, text in (("none.txt", None), ("a.csv", "a"), ("empty.txt", "\n")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(
            ValueError,
            match=f"(existing .* got|must hold at least one prompt).*{name}|{name} must hold at least one prompt",
        ):
            ImagesSuite(from_values(ImagesConfig, {"prompts": str(tmp_path / name)})).check()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="must hold an object"):
        read_prompts(str(tmp_path / "bad.jsonl"))

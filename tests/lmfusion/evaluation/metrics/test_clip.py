"""CLIP gets the input that transformers' own preprocessing makes, and its score is the cosine."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from lmfusion.evaluation.metrics.clip import MEAN, STD, load_clip
from lmfusion.evaluation.metrics.clip_score import ClipScorer
from tests.lmfusion.evaluation.metrics.clip_folder import MAX_TOKENS, save_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


def picture(width, height, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", [(32, 32), (50, 40), (33, 91)], ids=str)
def test_images_are_prepared_as_transformers_does(folder, size):
    expected = CLIPImageProcessorPil.from_pretrained(folder)(picture(*size), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(load_clip(folder).prepare(picture(*size)), expected, rtol=1e-5, atol=1e-5)


def test_features_are_the_models_own(folder):
    clip = load_clip(folder)
    pixels = torch.stack([clip.prepare(picture(40, 40, seed)) for seed in range(2)])
    texts = ["a dog", "two red cats"]
    tokens = clip.tokenizer(texts, padding=True, return_tensors="pt")
    output = CLIPModel.from_pretrained(folder).eval()(**tokens, pixel_values=pixels)
    image, text = clip.image_features(pixels), clip.text_features(texts)
    torch.testing.assert_close(image / image.norm(dim=1, keepdim=True), output.image_embeds)
    torch.testing.assert_close(text / text.norm(dim=1, keepdim=True), output.text_embeds)


def test_score_is_100_times_the_cosine_but_not_below_0(folder):
    images = [picture(40, 32, seed) for seed in range(5)] + [picture(32, 32, 9, "L")]
    captions = ["a dog", "cats", "the red bus", "x", "zebra", "grey"]
    scorer = ClipScorer(folder)
    cosines = []
    for image, caption in zip(images, captions, strict=True):
        pixels = scorer.clip.prepare(image)[None]
        a, b = scorer.clip.image_features(pixels)[0], scorer.clip.text_features([caption])[0]
        cosines.append(float(a @ b / (a.norm() * b.norm())))
    assert min(cosines) > 0.1
    expected = [100 * cosine for cosine in cosines]
    assert scorer.scores(images, captions) == pytest.approx(expected, abs=1e-3)
    assert ClipScorer(folder, batch_size=4).scores(iter(images), captions) == pytest.approx(expected, abs=1e-3)
    scorer.clip.model.text_projection.weight.data.neg_()
    assert scorer.scores(images, captions).tolist() == [0] * len(images)


def test_score_is_torchmetrics(folder):
    functional = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")
    from transformers import CLIPProcessor

    scorer = ClipScorer(folder)
    images = [picture(40, 40, seed) for seed in range(4)]
    captions = ["a dog", "cats", "the red bus", "x"]
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), scorer.clip.tokenizer)

    class Pooled:
        """CLIPModel as torchmetrics expects it: features as tensors."""

        def __init__(self):
            self.config = scorer.clip.model.config

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return scorer.clip.image_features(pixels)

        def get_text_features(self, input_ids, attention_mask):
            return scorer.clip.model.get_text_features(input_ids, attention_mask).pooler_output

    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    expected, _ = functional._clip_score_update(pixels, captions, Pooled(), processor)
    assert scorer.scores(images, captions) == pytest.approx(expected.clamp(min=0).tolist(), abs=1e-3)


def test_long_captions_are_truncated(folder):
    scorer = ClipScorer(folder)
    image = picture(32, 32)
    words = ["dog"] * MAX_TOKENS
    scores = scorer.scores([image] * 2, [" ".join(words), " ".join([*words, "cat"])])
    assert scores[0] == scores[1]


def test_details_name_the_weights(folder, tmp_path):
    details = ClipScorer(folder).details
    assert len(details["weights_sha256"]) == 64
    assert details["input_size"] == 32
    assert json.loads(json.dumps(details)) == details
    other = save_clip(tmp_path, seed=1)
    assert ClipScorer(other).details["weights_sha256"] != details["weights_sha256"]


def test_a_folder_without_a_processor_gets_clips_own(folder, tmp_path):
    for file in folder.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    clip = load_clip(tmp_path)
    assert (clip.mean, clip.std) == (MEAN, STD)
    assert load_clip(folder).mean == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("captions", [["a"], ["a", "b", "c"]])
def test_as_many_captions_as_images(folder, captions):
    with pytest.raises(ValueError, match=f"must have one caption, got {len(captions)} captions"):
        ClipScorer(folder).scores([picture(32, 32)] * 2, captions)


def test_bad_folders_are_refused(folder, tmp_path, tiny_llama):
    with pytest.raises(FileNotFoundError, match=r"must hold a config\.json"):
        load_clip(tmp_path)
    with pytest.raises(ValueError, match="type 'clip', got 'llama'"):
        load_clip(tiny_llama)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="must hold weights as safetensors"):
        load_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="must hold a CLIP that transformers can load"):
        load_clip(tmp_path)

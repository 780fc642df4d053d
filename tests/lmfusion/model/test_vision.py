"""Vision-language models compute what transformers' own classes compute, whatever else is trained."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

from lmfusion.model.vision import VisionEncoder, num_vision_tokens
from tests.lmfusion.vlms import build, picture, save_vlm

SHAPES = [(8, 8), (5, 23), (31, 7), (16, 16), (1, 40), (64, 33)]


@pytest.mark.parametrize("kind", ["llava_next", "llava"])
@pytest.mark.parametrize(("llm", "encoder"), [("llama", "clip"), ("qwen2", "siglip")])
def test_logits_are_those_of_transformers(tmp_path, kind, llm, encoder):
    theirs, processor = save_vlm(tmp_path, kind, llm, encoder)
    model = build(tmp_path)
    for shapes in [SHAPES[:1], SHAPES[1:3], SHAPES]:
        images = [picture(*shape, seed=i) for i, shape in enumerate(shapes)]
        text = "a" + "<image>b" * len(shapes) + " what?"
        inputs = processor(images=images, text=text, return_tensors="pt")
        inputs.pop("attention_mask")
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, atol=1e-4, rtol=1e-4)
        prepared = [model.vision.prepare(image) for image in images]
        num_tokens = int((inputs["input_ids"] == model.vision.image_token_id).sum())
        assert sum(image.num_tokens for image in prepared) == num_tokens
        embeddings = torch.cat(model.vision.encode(prepared))
        features = theirs.model.get_image_features(
            **{k: v for k, v in inputs.items() if k != "input_ids"}, return_dict=True
        ).pooler_output
        torch.testing.assert_close(embeddings, torch.cat(list(features)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"vision_feature_layer": [-1, 1]}])
def test_what_a_configuration_may_ask_for(tmp_path, options):
    """A head that is the embedding; features of several layers side by side."""
    theirs, processor = save_vlm(tmp_path, **options)
    model = build(tmp_path)
    inputs = processor(images=picture(9, 20), text="<image> what?", return_tensors="pt")
    inputs.pop("attention_mask")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert (model.text.lm_head is None) == ("tie_word_embeddings" in options)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("encoder", [CLIPVisionConfig, SiglipVisionConfig])
def test_rows_of_llava_are_counted_as_they_are_made(encoder, strategy):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = encoder(**sizes, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=vision, vision_feature_select_strategy=strategy)
    [embeddings] = VisionEncoder(config).encode_pixels(torch.zeros(1, 3, 8, 8))
    assert num_vision_tokens(config, 8, 8) == len(embeddings)

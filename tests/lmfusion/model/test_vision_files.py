"""Vision-language models on disk: all forms of names, saved whole or in part, verified, distinguished from LLMs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lmfusion.cli import main
from lmfusion.model.assembly import base_tensors
from lmfusion.model.modeling import LMFusion
from lmfusion.model.records import tensor_digests
from lmfusion.model.verification import verify
from tests.lmfusion.vlms import CODEC, IMAGE, build, picture, save_vlm

IMAGES = ["--codec", "pixels", "--channels", "1", "--image-size", "8", "--patch-coder", "linear"]


@pytest.fixture(scope="module")
def saved_vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    return folder, *save_vlm(folder)


@pytest.fixture
def vlm(saved_vlm, tmp_path):
    """A copy that tests may change."""
    return shutil.copytree(saved_vlm[0], tmp_path / "vlm")


def renamed(folder, rename, extra=None):
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()} | (extra or {}), folder / "model.safetensors")


def older(name):
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def newer(name):
    plain = name.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
    return plain if plain.startswith("lm_head") else f"model.{plain}"


@pytest.mark.parametrize("rename", [older, newer])
def test_tensors_by_the_names_of_other_versions(saved_vlm, vlm, rename):
    expected = tensor_digests(base_tensors(build(saved_vlm[0])))
    positions = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(5)} if rename is older else {}
    renamed(vlm, rename, positions)
    model = build(vlm)
    assert tensor_digests(base_tensors(model)) == expected
    assert verify(model).text_identical


@pytest.mark.parametrize("kind", ["llava_next", "llava"])
@pytest.mark.parametrize("parts", ["image", "all"])
def test_a_saved_model_sees_reads_and_draws_as_before(tmp_path, kind, parts):
    save_vlm(tmp_path / "vlm", kind)
    model = build(tmp_path / "vlm")
    model.save_pretrained(tmp_path / "saved", parts=parts)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert any(name.startswith("vision.") for name in stored) == (parts == "all")
    if parts == "all":
        shutil.rmtree(tmp_path / "vlm")
    loaded = LMFusion.from_pretrained(tmp_path / "saved")
    of_vlm = loaded.config.to_dict()["vlm_config"]
    assert of_vlm == model.config.to_dict()["vlm_config"] and "text_config" not in of_vlm
    assert loaded.config.text_config is loaded.config.vlm_config.text_config
    assert tensor_digests(base_tensors(loaded)) == model.base.sha256 == loaded.base.sha256
    prompt = [picture(5, 23), "draw"]
    options = {"max_new_tokens": 4, "min_images": 1, "max_images": 1, "num_steps": 2, "sampler": "ddim"}
    ours, theirs = (m.generate([prompt], **options)[0] for m in (model, loaded))
    assert ours.text == theirs.text and ours.images[0].tobytes() == theirs.images[0].tobytes()
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"{kind} with clip_vision_model, tiles of 8 x 8 pixels; frozen" in card
    assert "is a vision-language model" in card and "What it reads, sees and writes is the base model's" in card


def test_auto_model_and_dtype(vlm, tmp_path):
    build(vlm).save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.vision.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in (*loaded.vision.parameters(), *loaded.text.parameters()))
    assert not loaded.train().vision.training and not loaded.text.training


def test_the_text_tower_alone_is_the_llm(vlm, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(vlm)
    model.save_text(tmp_path / "llm")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(llm(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_another_vision_tower_is_refused_by_name(vlm, tmp_path):
    build(vlm).save_pretrained(tmp_path / "saved")
    tensors = load_file(vlm / "model.safetensors")
    tensors["multi_modal_projector.linear_1.bias"][0] += 1
    save_file(tensors, vlm / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 of 81 tensors differ, first 'vision.model.multi_modal_projector.linear_1"):
        LMFusion.from_pretrained(tmp_path / "saved")


def test_verification_covers_what_it_sees_with(vlm, tmp_path):
    model = build(vlm)
    found = verify(model)
    assert found.text_identical and found.num_tensors == 81 and len(found.prompts) == 4
    assert found.prompts[-1].prompt == "<image> What is in this image?" and found.prompts[-1].num_tokens > 30
    model.vision.model.multi_modal_projector.linear_2.bias.data[0] += 1
    found = verify(model)
    assert found.changed == ["vision.model.multi_modal_projector.linear_2.bias"] and not found.text_identical
    assert [check.identical for check in found.prompts] == [True, True, True, False]


def test_bfloat16_is_judged_by_its_own_rounding(vlm):
    assert verify(build(vlm, dtype=torch.bfloat16)).text_identical


def test_each_kind_of_base_has_its_own_method(vlm, tiny_llama):
    with pytest.raises(ValueError, match=r"must be an LLM, got .* of type 'llava_next'; use LMFusion.from_vlm"):
        LMFusion.from_llm(vlm, image=IMAGE, codec=CODEC)
    with pytest.raises(ValueError, match=r"an LLM of type 'llama'; use LMFusion.from_llm"):
        LMFusion.from_vlm(tiny_llama, image=IMAGE, codec=CODEC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "paligemma"}, "uses architecture 'paligemma'.*VLMs around one: llava, llava_next"),
        ({"vision_feature_select_strategy": "full"}, "must be 'default' .* got 'full'"),
        ({"vision_config": {"model_type": "dinov2"}}, "has a vision encoder of type 'dinov2'; supported: llava_next"),
        ({"text_config": {"model_type": "gemma"}}, "uses architecture 'gemma'"),
        ({"image_grid_pinpoints": [[8, 8]]}, r"image_grid_pinpoints must be the same .*, got \[\(8, 8\)\] and"),
    ],
)
def test_what_is_not_supported_is_named(vlm, changes, message):
    config = json.loads((vlm / "config.json").read_text())
    (vlm / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        build(vlm)


def test_image_processors_that_do_not_fit(vlm):
    processor = json.loads((vlm / "processor_config.json").read_text())
    processor["image_processor"]["crop_size"] = {"height": 12, "width": 12}
    (vlm / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match=r"must make tiles of 8 x 8 pixels, .*, got 12 x 12"):
        build(vlm)
    (vlm / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="has no image processor"):
        build(vlm)


def test_pixels_without_image_tokens_or_vision(vlm, tiny_llama, saved_vlm):
    _, _, processor = saved_vlm
    inputs = processor(images=picture(8, 8), text="a <image>", return_tensors="pt")
    inputs.pop("attention_mask")
    model = build(vlm)
    with pytest.raises(ValueError, match=r"must hold the \d+ image tokens of the images, got 1"):
        model(**{**inputs, "input_ids": torch.tensor([[5, model.vision.image_token_id]])})
    with pytest.raises(ValueError, match="image_sizes must be given"):
        model(**{name: inputs[name] for name in ("input_ids", "pixel_values")})
    with pytest.raises(ValueError, match="pixel_values need a model made with"):
        LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC)(**inputs)


def test_adapt_finds_out_which_kind_it_is(vlm, tmp_path, capsys):
    assert main(["adapt", str(vlm), str(tmp_path / "model"), *IMAGES, "--image-width", "16"]) == 0
    assert "M vision parameters" in capsys.readouterr().out
    picture(20, 9).save(tmp_path / "in.png")
    assert main(["caption", str(tmp_path / "model"), str(tmp_path / "in.png"), "--max-new-tokens", "3"]) == 0
    assert main(["verify", str(tmp_path / "model")]) == 0
    assert "81 of 81 have the base's sha256" in capsys.readouterr().out

"""`generate`, `draw` and `caption`: text as from the base LLM, images, captions, and errors that name the problem."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from lmfusion.generation import GenerationOptions, encode_prompt
from lmfusion.images.preprocessing import to_tensor
from lmfusion.model.batch import encode_caption
from tests.lmfusion.generation import reference
from tests.lmfusion.generation.models import build, tokens_of

PROMPTS = ["a seven", "the digit three, please", "x"]
PICTURES = [np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8) for i in range(3)]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return build(tiny_llama)


def texts(answers):
    return [answer.text for answer in answers]


# --- images ---


def test_images_depend_on_prompt_seed_guidance_and_negative_prompt(model):
    def draw(prompt="a seven", **settings):
        settings = {"num_steps": 3, "sampler": "ddim", "guidance_scale": 3.0, **settings}
        return np.asarray(model.draw([prompt], **settings)[0])

    base = draw()
    np.testing.assert_array_equal(base, draw())
    np.testing.assert_array_equal(base, draw(negative_prompt=" "))
    np.testing.assert_array_equal(base, draw("  a seven "))
    for other in (draw("a three"), draw(seed=1), draw(guidance_scale=1.0), draw(negative_prompt="blurred")):
        assert (base != other).any()
    for other in (draw(guidance_rescale=0.5), draw(guidance_interval=(0.5, 1.0)), draw(["a seven", PICTURES[0]])):
        assert (base != other).any()


def test_same_prompt_twice_gives_two_images(model):
    first, second = model.draw(["a seven"] * 2, num_steps=2)
    assert (np.asarray(first) != np.asarray(second)).any()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver"])
def test_batch_size_does_not_change_images(model, sampler):
    def draw(batch_size):
        return model.draw(PROMPTS, guidance_scale=2.0, num_steps=4, sampler=sampler, batch_size=batch_size)

    for batched, single in zip(draw(3), draw(1), strict=True):
        np.testing.assert_array_equal(np.asarray(batched), np.asarray(single))


@pytest.mark.parametrize(("guidance_scale", "num_documents"), [(1.0, 2), (1.5, 4)])
def test_prompt_is_read_once_and_steps_run_image_rows_alone(model, monkeypatch, guidance_scale, num_documents):
    calls, told = [], []
    run_layers, encode_images, decode_images = model.run_layers, model.encode_images, model.decode_images

    def record_layers(x_text, x_image, layout, kv_caches=None):
        calls.append((layout.num_text, layout.num_image))
        return run_layers(x_text, x_image, layout, kv_caches)

    def record_encode(latents, timesteps):
        told.append(timesteps.unique().tolist())
        return encode_images(latents, timesteps)

    def record_decode(h_image, timesteps, skip):
        told.append(timesteps.unique().tolist())
        return decode_images(h_image, timesteps, skip)

    monkeypatch.setattr(model, "run_layers", record_layers)
    monkeypatch.setattr(model, "encode_images", record_encode)
    monkeypatch.setattr(model, "decode_images", record_decode)
    model.draw(PROMPTS[:2], guidance_scale=guidance_scale, num_steps=4, batch_size=2)
    assert calls[0][1] == 0
    assert calls[1:] == [(0, num_documents * model.tokens_per_image)] * 4
    assert told == [[t] for t in (999, 999, 749, 749, 499, 499, 249, 249)]


def test_steps_outside_the_guidance_interval_run_one_branch(model, monkeypatch):
    rows = []
    run_layers = model.run_layers
    monkeypatch.setattr(model, "run_layers", lambda *a: (rows.append(a[2].num_image), run_layers(*a))[1])
    model.draw(["a seven"], num_steps=4, guidance_interval=(0.3, 0.6))  # steps at 999, 749, 499, 249
    assert rows == [0, 16, 16, 32, 16]


def test_all_ways_in_bfloat16(tiny_llama):
    model = build(tiny_llama, torch.bfloat16)
    image = np.asarray(model.draw(["a seven"], num_steps=3, guidance_scale=2.0)[0])
    exact = np.asarray(build(tiny_llama).draw(["a seven"], num_steps=3, guidance_scale=2.0)[0])
    assert np.abs(image.astype(int) - exact).mean() < 30 < np.abs(image.astype(int) - 128).mean()
    assert len(model.caption(PICTURES, max_new_tokens=2)) == 3
    assert model.generate(["x"], max_new_tokens=2)[0].num_new_tokens == 2


def test_images_of_another_size(model):
    image = model.draw(["a seven"], num_steps=2, image_size=12)[0]
    assert image.size == (12, 12) and image.mode == "L"


# --- text ---


def test_greedy_text_equals_uncached_and_transformers(model, tiny_llama):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    answers = texts(model.generate(PROMPTS, max_new_tokens=12))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        encoded = model.tokenizer(prompt, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        theirs = base.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected = theirs[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer == model.tokenizer.decode(expected, skip_special_tokens=True) and answer
        uncached = reference.answer(model, encode_prompt(model, prompt), GenerationOptions(max_new_tokens=12))[0]
        assert answer == model.tokenizer.decode(uncached, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_batch_size_does_not_change_text(model, temperature):
    def generate(batch_size):
        options = dict(max_new_tokens=10, temperature=temperature, batch_size=batch_size, seed=5)
        return texts(model.generate(PROMPTS, **options))

    assert generate(3) == generate(1) == generate(2)


def test_each_answer_stops_at_its_own_eos(model, monkeypatch):
    full = texts(model.generate(PROMPTS, max_new_tokens=12))
    first_ids = model.tokenizer(full[0], add_special_tokens=False)["input_ids"]
    stop = next(i for i in first_ids if any(i not in model.tokenizer(other)["input_ids"] for other in full[1:]))
    monkeypatch.setattr(model.config.text_config, "eos_token_id", [stop, 2])
    stopped = model.generate(PROMPTS, max_new_tokens=12)
    symbol = model.tokenizer.decode([stop])
    assert texts(stopped) == [text.split(symbol)[0] for text in full]
    assert {answer.finish_reason for answer in stopped} == {"stop", "length"}


def test_markers_are_never_written_where_no_image_may_come(model, monkeypatch):
    before = texts(model.generate(PROMPTS, max_new_tokens=8))
    text_logits = model.text_logits

    def prefer_markers(h_text):
        logits = text_logits(h_text)
        return torch.cat([logits[:, :-2], logits[:, -2:] + 1e6], dim=1)

    monkeypatch.setattr(model, "text_logits", prefer_markers)
    assert texts(model.generate(PROMPTS, max_new_tokens=8)) == before


def test_sampling_by_transformers_names(model):
    def generate(**options):
        return texts(model.generate(PROMPTS, max_new_tokens=12, seed=3, **options))

    greedy = generate()
    assert greedy == generate(do_sample=False) == generate(do_sample=True, top_k=1)
    assert greedy != generate(do_sample=True) == generate(temperature=1.0)


def test_chat_prompts_go_through_the_template(model, monkeypatch):
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}"
    template += "{% if add_generation_prompt %}>{% endif %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    turns = [{"role": "user", "content": "hi"}]
    plain = texts(model.generate(["[user:hi]>"], max_new_tokens=6))
    assert texts(model.generate(["hi"], max_new_tokens=6, chat=True)) == plain
    assert texts(model.generate([turns], max_new_tokens=6)) == plain
    monkeypatch.setattr(model.config, "chat_system_prompt", "be brief")
    told = texts(model.generate(["[system:be brief][user:hi]>"], max_new_tokens=6))
    assert texts(model.generate([turns], max_new_tokens=6)) == told
    for alone in (PICTURES[0], {"type": "text", "text": "hi"}):
        told = encode_prompt(model, [{"role": "user", "content": alone}])
        assert told.text == ("hi" if isinstance(alone, dict) else "") and told.num_images == isinstance(
            alone, np.ndarray
        )
    own = [{"role": "system", "content": "x"}, *turns]
    assert encode_prompt(model, own).parts == encode_prompt(model, "[system:x][user:hi]>").parts


# --- captions ---


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_batch_size_does_not_change_captions(model, temperature):
    def caption(batch_size):
        return model.caption(PICTURES, max_new_tokens=8, temperature=temperature, batch_size=batch_size)

    assert caption(3) == caption(1) == caption(2)


def test_captions_equal_uncached_ones(model, monkeypatch):
    told = []
    encode_images = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda x, t: (told.append(t.tolist()), encode_images(x, t))[1])
    captions = model.caption(PICTURES, prompt="it is", max_new_tokens=8)
    assert told == [[0, 0, 0]]  # without noise
    for picture, caption in zip(PICTURES, captions, strict=True):
        prompt = encode_prompt(model, [picture, "it is"])
        assert prompt.parts[-1] == encode_caption(model.tokenizer, "it is")
        torch.testing.assert_close(prompt.images[0], to_tensor(picture, 8, channels=1))
        document = prompt.document(16, tokens_of(model))
        assert [span for span in document.spans if span[0] != "text"] == [("marker", 1), ("image", 16), ("marker", 1)]
        ids = reference.answer(model, prompt, GenerationOptions(max_new_tokens=8))[0]
        assert caption == model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_caption_depends_on_the_image(model, tmp_path):
    black, white = np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)
    settings = {"max_new_tokens": 16, "temperature": 1.0, "seed": 3}
    of_black = model.caption([black], **settings)
    assert of_black != model.caption([white], **settings)
    Image.fromarray(black).save(tmp_path / "black.png")
    for path in (tmp_path / "black.png", str(tmp_path / "black.png")):
        assert model.caption([path], **settings) == of_black


def test_generation_leaves_training_mode_and_gradients_alone(model):
    model.train()
    model.draw(["x"], num_steps=1)
    model.caption(PICTURES[:1], max_new_tokens=1)
    model.generate(["x"], max_new_tokens=1)
    assert model.training and model.image.training and not model.text.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -0.5}, "guidance_scale must be between 0 and 1,000, got -0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be between 0 and 1,000, got nan"),
        ({"image_guidance_scale": -1}, "image_guidance_scale must be between 0 and 1,000, got -1"),
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval must be low and high with .*, got \(0.5, 0.2\)"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be between 0 and 1, got 1.5"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_steps": 2.5}, "num_steps .*must be a whole number"),
        ({"num_steps": 1001}, "num_steps must be at most 1000 here, got 1001"),
        ({"sampler": "euler"}, "sampler must be one of ddpm, .*, got 'euler'"),
        ({"sampler": object()}, "a diffusers scheduler"),
        ({"prompts": []}, "prompts must not be empty"),
        ({"prompts": "a seven"}, "prompts must be a list"),
        ({"prompts": ["fine", "  "]}, "caption is empty"),
        ({"prompts": ["word " * 60]}, "model's context of 256"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"image_size": 7}, "multiples of the patch size 2, got 7 x 7"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"image_size": "8"}, "image_size .*must be a whole number"),
        ({"preview_every": -1}, "preview_every must be at least 0, got -1"),
        ({"guidance_scale": "2"}, "guidance_scale .*must be a number"),
        ({"guidance_scale": True}, "guidance_scale .*must be a number"),
        ({"guidance_interval": 0.5}, "guidance_interval .*must be a list of 2"),
        ({"guidance_interval": (0.5,)}, "guidance_interval .*must be a list of 2"),
        ({"guidance_interval": ("a", "b")}, r"guidance_interval\[0\] .*must be a number"),
        ({"negative_prompt": 7}, "negative_prompt .*must be text"),
        ({"scale": 2}, "an option must be one of max_new_tokens, .*, got 'scale'"),
    ],
)
def test_wrong_image_settings_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.draw(**{"prompts": ["a seven"], **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens or max_images must be at least 1, got 0 for both"),
        ({"max_new_tokens": True}, "max_new_tokens .*must be a whole number"),
        ({"temperature": -1.0}, "temperature must be 0 or between 0.001 and 1000, got -1.0"),
        ({"temperature": float("inf")}, "temperature must be 0 or between 0.001 and 1000, got inf"),
        (
            {"temperature": 0.5, "do_sample": False},
            "do_sample must not be False with a temperature, got temperature 0.5",
        ),
        ({"temperature": 1e-39}, "temperature must be 0 or .*, got 1e-39"),
        ({"temperature": 10**400}, "temperature .*must be a number"),
        ({"temperature": "hot"}, "temperature .*must be a number"),
        ({"top_p": 0.0}, "top_p must be between 1e-06 and 1, got 0.0"),
        ({"top_p": 1e-50, "temperature": 1.0}, "top_p must be between 1e-06 and 1, got 1e-50"),
        ({"top_k": 10**400}, "top_k must be between 0 and 1,000,000, got 0x"),
        ({"top_p": 1.5}, "top_p must be between 1e-06 and 1, got 1.5"),
        ({"top_k": -1}, "top_k must be between 0 and 1,000,000, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"stop_strings": "end"}, "stop_strings .*must be a list"),
        ({"stop_strings": 5}, "stop_strings .*must be a list"),
        ({"stop_strings": ["so</s>"]}, "must not have text before a control token, got 'so</s>'"),
        ({"stop_strings": [""]}, "none empty"),
        ({"stop_strings": ["x"] * 17}, "at most 16"),
    ],
)
def test_wrong_decoding_settings_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(["x"], **settings)
    with pytest.raises(ValueError, match=message):
        model.stream("x", **settings)
    with pytest.raises(ValueError, match=message):
        model.caption(PICTURES[:1], **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_images": 1}, "min_images must be at most max_images \\(0\\), got 1"),
        ({"draw_first": True}, "max_images must be at least 1 with draw_first, got 0"),
        ({"draw_first": 1, "max_images": 1}, "draw_first .*must be true or false"),
        ({"image_guidance_scale": 1.5, "max_images": 10**9}, "max_images must be at most 16 here, got 1000000000"),
        (
            {"max_new_tokens": 0, "max_images": 1},
            "max_new_tokens must be at least 1 where text begins.*; set draw_first or min_images",
        ),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function, got 5"),
        (
            {"max_images": 1, "negative_prompt": "x" * 300},
            "negative_prompt must leave room for an image of 18 tokens .*, got 300 tokens",
        ),
    ],
)
def test_wrong_settings_of_text_and_images_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(["x"], **settings)


def test_what_draw_and_caption_decide_is_not_for_others_to_say(model):
    with pytest.raises(ValueError, match="draw generates an image and no text; leave out draw_first"):
        model.draw(["x"], draw_first=False)
    with pytest.raises(ValueError, match="caption generates text and no image; leave out max_images"):
        model.caption(PICTURES[:1], max_images=1)


def test_sliding_window_bounds_the_context(model, monkeypatch):
    monkeypatch.setattr(model.config.text_config, "sliding_window", 20, raising=False)
    answer = model.generate(["0123456789"], max_new_tokens=99)[0]  # 11 tokens with bos
    assert answer.num_new_tokens == 10 and answer.finish_reason == "length"  # the last one takes no slot
    with pytest.raises(ValueError, match=r"must fit the model's context of 20 tokens, got 21 and 1 tokens; shorten"):
        model.generate(["0123456789" * 2], max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "a prompt must not be empty"),
        ([], "a prompt must not be empty"),
        (["fine", ""], "caption is empty"),
        (["fine", 3], "a part of a prompt must be a text or an image .*, got 3"),
        ("half \ud800", "a text is not valid Unicode: surrogates not allowed at character 5"),
        (["half \ud800"], "a text is not valid Unicode"),
        (b"bytes", "a prompt must be a text, .*, got b'bytes'"),
        ({"role": "user", "content": "x"}, "must be a text, a list of texts and images, or a list of messages"),
        (7, "a prompt must be a text, .*, got 7"),
        ([np.zeros((2, 2, 9), np.uint8)], "array"),
        ([{"role": "user", "content": "x"}], "no chat template"),
    ],
)
def test_wrong_prompts_are_named(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        model.generate([prompt])
    with pytest.raises(ValueError, match=message):
        model.stream(prompt)


def test_wrong_images_and_models_without_tokenizer_are_named(model, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"no chat template"):
        model.generate(["hi"], chat=True)
    with pytest.raises(ValueError, match=r"images must not be empty"):
        model.caption([])
    for missing in (tmp_path / "missing.png", str(tmp_path / "missing.png")):
        with pytest.raises(FileNotFoundError, match=r"missing.png"):
            model.caption([missing])
    monkeypatch.setattr(model, "tokenizer", None)
    for call in (lambda: model.generate(["x"]), lambda: model.draw(["x"]), lambda: model.stream("x")):
        with pytest.raises(ValueError, match=r"must have a tokenizer"):
            call()

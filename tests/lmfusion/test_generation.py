"""Generation: caches, batches and guidance in one forward change nothing; chance is keyed; wrong input is named."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import lmfusion_kernels as lk
from lmfusion.batch import Document, SpecialTokens, caption_prompt, draw_prompt, encode_caption
from lmfusion.generation import caption_images, draw_images, generate_text
from lmfusion.generation.drawing import Denoiser
from lmfusion.generation.sampling import generators, next_tokens
from lmfusion.generation.text import end_token_ids
from lmfusion.image.preprocessing import to_pil, to_tensor
from lmfusion.modeling import LMFusion

PROMPTS = ["a seven", "the digit three, please", "x"]
LATENT_SHAPE = (1, 8, 8)
NUM_IMAGE_TOKENS = 16


def build(folder, dtype=torch.float64, **patch_coder):
    """A model whose every weight matters: what training starts at zero is drawn too."""
    model = LMFusion.from_llm(
        folder,
        image={"hidden_size": 16, "patch_coder": {"kind": "linear", **patch_coder}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
        diffusion={"prediction_type": "v_prediction"},
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def model(tiny_llama):
    return build(tiny_llama)


@pytest.fixture(scope="module")
def pictures():
    return [np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8) for i in range(3)]


def tokens_of(model):
    return SpecialTokens.of(model.tokenizer, model.boi_token_id)


def draw_documents(model):
    return [draw_prompt(encode_caption(model.tokenizer, prompt), tokens_of(model)) for prompt in PROMPTS]


def uncached_prediction(model, document, latent, timestep):
    """The whole document in one forward, without a cache."""
    layout = lk.TokenLayout.from_spans([document.image(NUM_IMAGE_TOKENS).spans])
    timesteps = torch.tensor([timestep])
    rows, skip = model.encode_images(latent[None], timesteps)
    _, h_image = model.run_layers(model.embed(torch.tensor(document.token_ids)), rows, layout)
    return model.decode_images(h_image, timesteps, skip)[0]


def uncached_greedy(model, document, rows, num_new):
    """Greedy ids by reading the whole document again for every token."""
    ids = []
    for _ in range(num_new):
        grown = document.text(ids)
        layout = lk.TokenLayout.from_spans([grown.spans])
        x_image = torch.zeros(0, 16, dtype=torch.float64) if rows is None else rows
        h_text, _ = model.run_layers(model.embed(torch.tensor(grown.token_ids)), x_image, layout)
        next_id = int(model.text_logits(h_text[-1:])[0, : model.boi_token_id].argmax())
        if next_id in end_token_ids(model):
            break
        ids.append(next_id)
    return ids


# --- drawing ---


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_cached_prediction_equals_uncached(tiny_llama, dtype, tolerance):
    model = build(tiny_llama, dtype)
    documents = draw_documents(model)
    denoiser = Denoiser(model, documents, LATENT_SHAPE)
    generator = torch.Generator().manual_seed(0)
    for timestep in (999, 500, 0):  # each step overwrites the image of the one before
        latents = torch.randn(3, *LATENT_SHAPE, generator=generator, dtype=dtype)
        predictions = denoiser.predict(latents, timestep)
        assert predictions.abs().max() > 0.1
        for document, latent, prediction in zip(documents, latents, predictions, strict=True):
            expected = uncached_prediction(model, document, latent, timestep)
            torch.testing.assert_close(prediction, expected, atol=tolerance, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", ["linear", "unet"])
def test_guidance_in_one_forward_equals_two(tiny_llama, kind, dtype, tolerance):
    unet = {"kind": "unet", "channels": (8, 16), "num_blocks": 1}
    model = build(tiny_llama, dtype, **(unet if kind == "unet" else {}))
    conditional = draw_documents(model)
    unconditional = [draw_prompt([], tokens_of(model))] * 3
    latents = torch.randn(3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)
    together = Denoiser(model, conditional + unconditional, LATENT_SHAPE).predict(latents, 700)
    apart = [
        Denoiser(model, documents, LATENT_SHAPE).predict(latents, 700) for documents in (conditional, unconditional)
    ]
    torch.testing.assert_close(together, torch.cat(apart), atol=tolerance, rtol=0)
    assert (apart[0] - apart[1]).abs().max() > 1e-3


def test_guidance_goes_from_the_unconditional_prediction_past_the_prompts(model):
    """One DDIM step done by hand, from uncached predictions."""
    drawn = draw_images(model, ["a seven"], guidance_scale=2.5, num_steps=1, sampler="ddim", seed=7)[0]
    noise = torch.randn(LATENT_SHAPE, generator=generators(7, [0])[0])
    with torch.inference_mode():
        conditional, base = (
            uncached_prediction(model, draw_prompt(ids, tokens_of(model)), noise, 999)
            for ids in (encode_caption(model.tokenizer, "a seven"), [])
        )
    velocity = base + 2.5 * (conditional - base)
    expected = to_pil(-velocity[None].clamp(-1, 1))[0]  # at t = 999 all is noise, so the velocity is minus the image
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1
    assert np.asarray(drawn).std() > 20


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver"])
def test_batched_drawings_equal_single_ones(model, sampler):
    def draw(batch_size):
        return draw_images(model, PROMPTS, guidance_scale=2.0, num_steps=4, sampler=sampler, batch_size=batch_size)

    for batched, single in zip(draw(3), draw(1), strict=True):
        np.testing.assert_array_equal(np.asarray(batched), np.asarray(single))


def test_drawing_depends_on_prompt_seed_guidance_and_negative_prompt(model):
    def draw(prompt="a seven", **settings):
        settings = {"num_steps": 3, "sampler": "ddim", "guidance_scale": 3.0, **settings}
        return np.asarray(draw_images(model, [prompt], **settings)[0])

    base = draw()
    np.testing.assert_array_equal(base, draw())
    np.testing.assert_array_equal(base, draw(negative_prompt=""))
    for other in (draw("a three"), draw(seed=1), draw(guidance_scale=1.0), draw(negative_prompt="blurred")):
        assert (base != other).any()


def test_same_prompt_twice_gives_two_images(model):
    first, second = draw_images(model, ["a seven"] * 2, num_steps=2)
    assert (np.asarray(first) != np.asarray(second)).any()


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
    draw_images(model, PROMPTS[:2], guidance_scale=guidance_scale, num_steps=4, batch_size=2)
    assert calls[0][1] == 0
    assert calls[1:] == [(0, num_documents * NUM_IMAGE_TOKENS)] * 4
    assert told == [[t] for t in (999, 999, 749, 749, 499, 499, 249, 249)]


def test_all_ways_in_bfloat16(tiny_llama, pictures):
    model = build(tiny_llama, torch.bfloat16)
    image = np.asarray(draw_images(model, ["a seven"], num_steps=3, guidance_scale=2.0)[0])
    reference = np.asarray(draw_images(build(tiny_llama), ["a seven"], num_steps=3, guidance_scale=2.0)[0])
    assert np.abs(image.astype(int) - reference).mean() < 30 < np.abs(image.astype(int) - 128).mean()
    assert len(caption_images(model, pictures, max_new_tokens=2)) == 3
    assert generate_text(model, ["x"], max_new_tokens=2) != [""]


def test_drawing_at_another_size(model):
    image = draw_images(model, ["a seven"], num_steps=2, image_size=12)[0]
    assert image.size == (12, 12) and image.mode == "L"


# --- text ---


def test_greedy_text_equals_uncached_and_transformers(model, tiny_llama):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    answers = generate_text(model, PROMPTS, max_new_tokens=12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        encoded = model.tokenizer(prompt, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        theirs = base.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected = theirs[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer == model.tokenizer.decode(expected, skip_special_tokens=True) and answer
        document = Document().text(inputs["input_ids"][0].tolist())
        assert answer == model.tokenizer.decode(uncached_greedy(model, document, None, 12), skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_batched_text_equals_single(model, temperature):
    def generate(batch_size):
        return generate_text(model, PROMPTS, max_new_tokens=10, temperature=temperature, batch_size=batch_size, seed=5)

    assert generate(3) == generate(1) == generate(2)


def test_each_row_stops_at_its_own_eos(model, monkeypatch):
    full = generate_text(model, PROMPTS, max_new_tokens=12)
    first_ids = model.tokenizer(full[0], add_special_tokens=False)["input_ids"]
    stop = next(i for i in first_ids if any(i not in model.tokenizer(other)["input_ids"] for other in full[1:]))
    monkeypatch.setattr(model.config.text_config, "eos_token_id", [stop, 2])
    stopped = generate_text(model, PROMPTS, max_new_tokens=12)
    symbol = model.tokenizer.decode([stop])
    assert stopped == [text.split(symbol)[0] for text in full]
    assert len({len(text) for text in stopped}) > 1


def test_markers_are_never_written(model, monkeypatch):
    before = generate_text(model, PROMPTS, max_new_tokens=8)
    text_logits = model.text_logits

    def prefer_markers(h_text):
        logits = text_logits(h_text)
        return torch.cat([logits[:, :-2], logits[:, -2:] + 1e6], dim=1)

    monkeypatch.setattr(model, "text_logits", prefer_markers)
    assert generate_text(model, PROMPTS, max_new_tokens=8) == before


def test_chat_prompts_go_through_the_template(model, monkeypatch):
    template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    template += "{% if add_generation_prompt %}>{% endif %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    assert generate_text(model, ["hi"], max_new_tokens=6, chat=True) == generate_text(
        model, ["[hi]>"], max_new_tokens=6
    )


def test_chance_follows_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    chance = generators(0, range(4000))
    counts = next_tokens(logits, 1.0, 1.0, chance).bincount(minlength=4)
    expected = logits[0].softmax(0) * 4000
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()
    assert (next_tokens(logits, 1.0, 0.7, chance).bincount(minlength=4) > 0).tolist() == [True, True, False, False]
    assert (next_tokens(logits, 1.0, 1e-6, chance) == 0).all()
    assert (next_tokens(logits, 0.01, 1.0, chance) == 0).all()


def test_generators_are_keyed_by_seed_and_index():
    first = [torch.rand((), generator=g).item() for g in generators(0, [0, 1, 2])]
    assert first == [torch.rand((), generator=g).item() for i in range(3) for g in generators(0, [i])]
    assert len({*first, torch.rand((), generator=generators(1, [0])[0]).item()}) == 4


# --- captions ---


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_batched_captions_equal_single_ones(model, pictures, temperature):
    def caption(batch_size):
        return caption_images(model, pictures, max_new_tokens=8, temperature=temperature, batch_size=batch_size)

    assert caption(3) == caption(1) == caption(2)


def test_captions_equal_uncached_ones(model, pictures, monkeypatch):
    told = []
    encode_images = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda x, t: (told.append(t.tolist()), encode_images(x, t))[1])
    batched = caption_images(model, pictures, prompt="it is", max_new_tokens=8)
    assert told == [[0, 0, 0]]
    with torch.inference_mode():
        for picture, caption in zip(pictures, batched, strict=True):
            latents = model.codec.encode(to_tensor(picture, 8, channels=1)[None])
            rows, _ = model.encode_images(latents, torch.zeros(1, dtype=torch.int64))  # t = 0, no noise
            prompt_ids = encode_caption(model.tokenizer, "it is")
            document = caption_prompt(prompt_ids, NUM_IMAGE_TOKENS, tokens_of(model))
            ids = uncached_greedy(model, document, rows, 8)
            assert caption == model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_caption_without_prompt_depends_on_the_image(model, pictures):
    black, white = np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)
    settings = {"max_new_tokens": 16, "temperature": 1.0, "seed": 3}
    assert caption_images(model, [black], **settings) != caption_images(model, [white], **settings)


def test_generation_leaves_training_mode_and_gradients_alone(model, pictures):
    model.train()
    draw_images(model, ["x"], num_steps=1)
    caption_images(model, pictures[:1], max_new_tokens=1)
    generate_text(model, ["x"], max_new_tokens=1)
    assert model.training and model.image.training and not model.text.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -0.5}, "guidance_scale is -0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 1001}, "num_steps is 1001"),
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "a seven"}, "give a list"),
        ({"prompts": ["fine", "  "]}, "caption is empty"),
        ({"prompts": ["word " * 60]}, "model's context is 256"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"image_size": 7}, "7 x 7 does not divide"),
        ({"image_size": 0}, "image_size is 0"),
    ],
)
def test_wrong_drawing_settings_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        draw_images(model, **{"prompts": ["a seven"], **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"max_new_tokens": 300}, "model's context is 256"),
    ],
)
def test_wrong_decoding_settings_are_named(model, pictures, settings, message):
    with pytest.raises(ValueError, match=message):
        generate_text(model, ["x"], **settings)
    with pytest.raises(ValueError, match=message):
        caption_images(model, pictures[:1], **settings)


def test_sliding_window_bounds_the_context(model, monkeypatch):
    monkeypatch.setattr(model.config.text_config, "sliding_window", 20, raising=False)
    assert len(generate_text(model, ["0123456789"], max_new_tokens=9)) == 1  # 11 tokens with bos
    with pytest.raises(ValueError, match=r"need 21, but the model's context is 20"):
        generate_text(model, ["0123456789"], max_new_tokens=10)


def test_wrong_prompts_and_images_are_named(model, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"prompts is empty"):
        generate_text(model, [])
    with pytest.raises(ValueError, match=r"a prompt is empty"):
        generate_text(model, [""])
    with pytest.raises(ValueError, match=r"no chat template"):
        generate_text(model, ["hi"], chat=True)
    with pytest.raises(ValueError, match=r"images is empty"):
        caption_images(model, [])
    with pytest.raises(FileNotFoundError, match=r"missing.png"):
        caption_images(model, [tmp_path / "missing.png"])
    monkeypatch.setattr(model, "tokenizer", None)
    for call in (lambda: generate_text(model, ["x"]), lambda: draw_images(model, ["x"])):
        with pytest.raises(ValueError, match=r"no tokenizer"):
            call()

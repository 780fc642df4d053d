"""An image, or a token, from a whole model: the engine, beside recomputing the whole prompt at every step.

A SmolLM2-135M beside the narrow image tower of recipes/digits.yaml, with random weights: 20 steps of DPM-Solver++ with
guidance make a digit of 8 x 8. Rates of decoding count the bytes that a token has to read: the text tower's weights
and the cache.
"""

import functools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import lmfusion_kernels as lk
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row
from lmfusion.generation import Engine, GenerationOptions, ImageEnd, encode_prompt
from lmfusion.generation.decoding import random_generator
from lmfusion.generation.samplers import advance, step_table
from lmfusion.model.batch import SpecialTokens, draw_prompt, encode_caption
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.modeling import LMFusion

NUM_STEPS, SCALE = 20, 2.0
DRAWING = {"num_steps": NUM_STEPS, "guidance_scale": SCALE, "sampler": "dpm-solver"}
PROMPTS = [f"a handwritten {name}" for name in ("zero", "one", "two", "three", "four", "five", "six", "seven")]
VOCABULARY, NUM_LAYERS = 49_152, 30
NUM_TOKENS = 16
"""Tokens of a decoding row."""


def byte_tokenizer():
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.cache
def digit_model(dtype, device):
    shape = shapes.SMOLLM2
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LMFusion(LMFusionConfig(
        text,
        image={"hidden_size": 128, "patch_coder": {"kind": "linear", "patch_size": 2}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
        diffusion={"prediction_type": "v_prediction"},
    ))  # fmt: skip
    torch.nn.init.normal_(model.image.patch_coder.out_proj.weight, std=0.05)  # starts at zero, which would hide errors
    model.tokenizer = byte_tokenizer()
    return model.eval().to(device=device, dtype=dtype)


def pixels(images):
    return [torch.from_numpy(np.stack([np.asarray(image) for image in images])).float()]


@torch.no_grad()
def recompute(model, prompts):
    """Without a cache: both documents of every image, packed into one forward, are recomputed at every step."""
    tokens = SpecialTokens.of(model.tokenizer, model.boi_token_id)
    latent_shape = (model.codec.latent_channels, model.codec.latent_size, model.codec.latent_size)
    table = step_table(model.diffusion, "dpm-solver", NUM_STEPS, model.codec.latent_range)
    conditional = [draw_prompt(encode_caption(model.tokenizer, prompt), tokens) for prompt in prompts]
    documents = [*conditional, *[draw_prompt([], tokens)] * len(prompts)]
    spans = [document.image(model.tokens_per_image).spans for document in documents]
    layout = lk.TokenLayout.from_spans(spans, device=model.device)
    ids = torch.tensor([i for document in documents for i in document.token_ids], device=model.device)
    in_tower_order = layout.tower_to_sequence[: layout.num_text]
    is_text = torch.zeros(layout.num_tokens, dtype=torch.int64, device=model.device)
    is_text[in_tower_order.long()] = 1
    x_text = model.embed(ids[(is_text.cumsum(0) - 1)[in_tower_order.long()]])
    noise = [torch.randn(latent_shape, generator=random_generator(0, i, 1)) for i in range(len(prompts))]
    x, x0 = torch.stack(noise).to(model.device), torch.zeros(len(prompts), *latent_shape, device=model.device)
    for timestep, numbers in zip(table.timesteps, table.coefficients.to(model.device), strict=True):
        timesteps = torch.full((2 * len(prompts),), timestep, device=model.device)
        rows, skip = model.encode_images(x.repeat(2, 1, 1, 1), timesteps)
        _, h_image = model.run_layers(x_text, rows, layout)
        full, base = model.decode_images(h_image, timesteps, skip).to(x.dtype).chunk(2)
        prediction = base + SCALE * (full - base)
        x, x0 = advance(x, prediction, x0, torch.zeros_like(x), numbers.expand(len(prompts), -1), table.clip)
    return ((model.codec.decode(x)[:, 0] + 1) * 127.5).round()


def generate_images(model, prompts, batch_size):
    return Contestant(lambda _: lambda: model.draw(prompts, batch_size=batch_size, **DRAWING), results=pixels)


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=shapes.dtype_id)
def test_digit(record, device, dtype):
    """One digit, with a bar relative to recomputing the prompt at every step."""
    model = digit_model(dtype, device)
    row = Row("generation", f"1 digit, {NUM_STEPS} guided steps", dtype, "forward", "SmolLM2-135M", 1,
              bars={"prefix read at every step": 0.5}, is_latency=True)  # fmt: skip
    record(row, {
        "ours": generate_images(model, PROMPTS[:1], 1),
        "prefix read at every step": Contestant(lambda _: lambda: recompute(model, PROMPTS[:1])),
    })  # fmt: skip


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=shapes.dtype_id)
def test_previews(record, device, dtype):
    """The same digit with a preview at every step."""
    model = digit_model(dtype, device)
    row = Row("generation", f"1 digit, {NUM_STEPS} guided steps, {NUM_STEPS - 1} previews", dtype, "forward",
              "SmolLM2-135M", 1, bars={"no previews": 1.05}, is_latency=True)  # fmt: skip

    def streamed(preview_every):
        options = {"draw_first": True, "max_images": 1, "max_new_tokens": 0, "preview_every": preview_every}
        events = list(model.stream([PROMPTS[0]], **options, **DRAWING))
        return [event.image for event in events if isinstance(event, ImageEnd)]

    record(row, {
        "ours": Contestant(lambda _: lambda: streamed(1), results=pixels),
        "no previews": Contestant(lambda _: lambda: streamed(0), results=pixels),
    })  # fmt: skip


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=shapes.dtype_id)
def test_digits_in_a_batch(record, device, dtype):
    model = digit_model(dtype, device)
    row = Row("generation", f"8 digits, {NUM_STEPS} guided steps", dtype, "forward", "SmolLM2-135M", 8,
              bars={"one after the other": 0.5}, is_latency=True)  # fmt: skip
    record(row, {
        "ours": generate_images(model, PROMPTS, 8),
        "one after the other": generate_images(model, PROMPTS, 1),
        "prefix read at every step": Contestant(lambda _: lambda: recompute(model, PROMPTS)),
    })  # fmt: skip


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=shapes.dtype_id)
@pytest.mark.parametrize("batch", [1, 8, 64] if shapes.HAS_GPU else [1, 8])
def test_text(record, device, batch, dtype):
    """Tokens of running requests; the bytes are those of the weights and of the cache."""
    model = digit_model(dtype, device)
    prompt = encode_prompt(model, "x" * 128)

    def prepare(_):
        engine = Engine(model, num_slots=batch * 4096, max_batch=batch)
        for _ in range(batch):
            engine.submit(prompt, GenerationOptions(max_new_tokens=3900))
        engine.step()  # prefill

        def decode():
            events = [engine.step() for _ in range(NUM_TOKENS)]
            return torch.tensor([float(len(of_step)) for of_step in events])

        return decode

    num_bytes = engine_bytes(model, batch, dtype)
    row = Row("generation", f"{NUM_TOKENS} tokens of {batch} answer{'s' * (batch > 1)}", dtype, "forward",
              "SmolLM2-135M", batch * NUM_TOKENS, num_bytes=num_bytes, is_latency=True)  # fmt: skip
    record(row, {"ours": Contestant(prepare, results=lambda _: [torch.zeros(1)])})


def engine_bytes(model, batch, dtype):
    weights = sum(parameter.numel() for parameter in model.text.parameters())
    cached = 2 * batch * 128 * NUM_LAYERS * shapes.SMOLLM2.num_kv_heads * shapes.SMOLLM2.head_dim
    return NUM_TOKENS * (weights + cached) * dtype.itemsize

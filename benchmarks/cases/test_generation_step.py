"""One generation step of a whole model, replayed as a CUDA graph and launched op by op.

A denoising step is patch coder, image tower, guidance and sampler for images of several requests; a decoding step is
the text tower, its head and the choice of a token for each document. Models have random weights: all 30 layers of
SmolLM2-135M, and 4 layers of the size of Llama-3 8B's. The floor of decoding is reading weights and cache once.
"""

import functools
from functools import partial

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row
from lmfusion.generation.cache import CachedDocument, KeyValueCache
from lmfusion.generation.decoding import SamplingParams
from lmfusion.generation.device_steps import Branching, decode_step, denoise_step
from lmfusion.generation.graphs import ReplayedStep, recorder_for
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.modeling import LMFusion

NUM_LAYERS = {shapes.SMOLLM2: 30, shapes.LMFUSION_8B: 4}
VOCABULARY = {shapes.SMOLLM2: 49_152, shapes.LMFUSION_8B: 128_256}
SHAPES = list(NUM_LAYERS) if shapes.HAS_GPU else [shapes.SMOLLM2]
BATCHES = [1, 8, 64] if shapes.HAS_GPU else [1, 8]
LATENT_SIZE, CONTEXT = (32, 64) if shapes.HAS_GPU else (8, 32)
"""Pixels a side, four a row; tokens before an image."""
DECODED_CONTEXT = 1024 if shapes.HAS_GPU else 128


@functools.lru_cache(maxsize=1)
def make_model(shape, dtype, device):
    text = LlamaConfig(
        vocab_size=VOCABULARY[shape], hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=NUM_LAYERS[shape], num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, tie_word_embeddings=True,
    )  # fmt: skip
    config = LMFusionConfig(
        text,
        image={"patch_coder": {"kind": "linear", "patch_size": 2}},
        codec={"kind": "pixels", "channels": 3, "image_size": LATENT_SIZE},
    )
    with torch.device("meta"):  # no weights on the host, where sampling them would take minutes
        model = LMFusion(config)
    model = model.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model


def make_cache(model, documents, length, room):
    """A cache for documents that have `length` tokens and room for more."""
    cache = KeyValueCache(model, documents * (length + room))
    generator = torch.Generator(model.device).manual_seed(0)
    for buffers in cache.layers:
        for buffer in buffers:
            buffer.normal_(generator=generator)
    return cache


def contestants(model, step, make_arguments, make_cache_of):
    """The step launched op by op, and on a GPU also replayed as a graph."""

    def prepare(recorder, seed):
        cache = make_cache_of()
        run = ReplayedStep(partial(step, model, cache), model.device, recorder)
        arguments = make_arguments(cache, seed)

        @torch.no_grad()
        def call():
            return run(*arguments)

        return call

    lines = {"ours": Contestant(lambda seed: prepare(recorder_for(model.device, None), seed))}
    if model.device.type == "cuda":
        lines["ours, launched op by op"] = Contestant(lambda seed: prepare(None, seed))
    return lines


def layout_of(cache, documents, length, room, span):
    """The layout that continues each document of `make_cache`."""
    cached = [CachedDocument((length + room) * i, length + room, length) for i in range(documents)]
    return cache.layout(cached, [[span]] * documents)


@pytest.mark.parametrize("dtype", shapes.DTYPES[:1], ids=shapes.dtype_id)
@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_denoising(record, device, shape, batch, is_guided, dtype):
    model = make_model(shape, dtype, device)
    branches, rows = (2 if is_guided else 1), model.tokens_per_image
    documents = batch * branches

    def arguments(cache, seed):
        x, x0, noise = (
            torch.randn(batch, 3, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(3 * seed + i))
            for i in range(3)
        )
        numbers = torch.tensor([[500.0, 0.9, -0.4, 0.5, 0.5, 0.0, 0.1]]).repeat(batch, 1)
        layout = layout_of(cache, documents, CONTEXT, rows, ("image", rows))
        branching = None
        if is_guided:
            image = torch.arange(batch)
            branching = Branching(
                image=torch.cat([image, image]),
                branch=torch.stack([image, image + batch, image], dim=1),
                weights=torch.tensor([[2.0, -1.0, 0.0]]).repeat(batch, 1),
                rescale=torch.zeros(batch),
            )
        return x.to(device), x0.to(device), noise, numbers, layout, branching, 1.0

    parameters = shape.num_parameters * NUM_LAYERS[shape]
    pairs = documents * rows * (CONTEXT + rows) * NUM_LAYERS[shape]
    flops = 2.0 * parameters * documents * rows + 4.0 * pairs * shape.num_heads * shape.head_dim
    name = f"denoise {batch} image{'s' if batch > 1 else ''} of {rows} rows, {'guided' if is_guided else 'unguided'}"
    row = Row("generation_step", name, dtype, "forward", shape.name, documents * rows, flops=flops, is_latency=True)
    record(row, contestants(model, denoise_step, arguments, lambda: make_cache(model, documents, CONTEXT, rows)))


@pytest.mark.parametrize("dtype", shapes.DTYPES[:1], ids=shapes.dtype_id)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding(record, device, shape, batch, dtype):
    """Tokens per second are documents over ms; the share of the ceiling is relative to the bandwidth floor."""
    model = make_model(shape, dtype, device)

    def arguments(cache, seed):
        generator = torch.Generator().manual_seed(seed)
        token_ids = torch.randint(0, VOCABULARY[shape], (batch,), generator=generator)
        ones = torch.ones(batch)
        choice = SamplingParams(torch.zeros(batch), torch.zeros(batch), ones, ones.long(), torch.zeros(batch))
        return token_ids, layout_of(cache, batch, DECODED_CONTEXT, 1, ("text", 1)), choice, True

    weights = sum(parameter.numel() for parameter in model.text.parameters())
    cached = 2 * batch * (DECODED_CONTEXT + 1) * NUM_LAYERS[shape] * shape.num_kv_heads * shape.head_dim
    name = f"decode a token of {batch} document{'s' if batch > 1 else ''}, context {DECODED_CONTEXT}"
    row = Row("generation_step", name, dtype, "forward", shape.name, batch,
              num_bytes=(weights + cached) * dtype.itemsize, is_latency=True)  # fmt: skip
    record(row, contestants(model, decode_step, arguments, lambda: make_cache(model, batch, DECODED_CONTEXT, 1)))

"""One layer of a denoising step: only the rows of images, over cached context.

The branches of classifier-free guidance are documents of one batch: 1 (none), 2 (prompt) or 3 (prompt and image). Times
are latencies: the device is idle before each call, as it is for a sampler that only waits for its own launches.
"""

import dataclasses

import pytest
import torch

import lmfusion_kernels as lk
from benchmarks.baselines.slabs import slabs
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row, graphed
from benchmarks.harness.layer import cache_of, frozen, layer_flops, make_case

SHAPE = shapes.BAGEL_7B if shapes.HAS_GPU else shapes.SMOLLM2
CASES = [(image, context, branches) for image in (1024, 4096) for context in (40, 2048) for branches in (1, 2, 3)]
BATCH_SHAPES = [shapes.LMFUSION_8B, shapes.SMOLLM2]
BATCHES = [(batch, branches) for batch in (1, 4, 16, 64) for branches in (1, 2)]
BATCH_IMAGE, BATCH_CONTEXT = 256, 64
if not shapes.HAS_GPU:
    CASES = [(256, context, branches) for context in (40, 512) for branches in (1, 3)]
    BATCH_SHAPES, BATCHES = [shapes.SMOLLM2], [(batch, branches) for batch in (1, 8) for branches in (1, 2)]
    BATCH_IMAGE, BATCH_CONTEXT = 64, 32


def make_denoise_case(shape, num_documents, image, context, dtype, device):
    """Documents that are an image after `context` cached tokens; the caches hold random rows."""
    case = make_case(shape, [[("image", image)]] * num_documents, dtype, device, frozen_text=True,
                     **cache_of(num_documents, context, context + image))  # fmt: skip
    size = (case.layout.num_keys, shape.num_kv_heads, shape.head_dim)
    return frozen(case), tuple(torch.randn(*size, device=device).to(dtype) for _ in range(2))


def cached_block(case, kv_cache):
    def forward(x_text, x_image):
        return lk.routed_block((x_text, x_image), case.layout, case.text, case.image, case.rope, kv_cache=kv_cache)

    return forward


def inference(case, forward, **options):
    """forward(text rows, image rows) without gradients. Every call writes the same values into the caches."""

    def prepare(seed):
        rows = [x.detach() for x in case.rows(seed)]

        @torch.no_grad()
        def call():
            return forward(*rows)

        return call

    return Contestant(prepare, **options)


def one_by_one(case, caches, image, context):
    """One forward per document, each with its own cache, as most samplers compute guidance and some compute batches."""
    num_documents = case.layout.num_documents
    single, _ = make_denoise_case(case.shape, 1, image, context, case.dtype, case.device)
    single = dataclasses.replace(single, text=case.text, image=case.image)
    capacity = single.layout.num_keys
    own = [tuple(cache[i * capacity : (i + 1) * capacity].clone() for cache in caches) for i in range(num_documents)]
    forwards = [cached_block(single, cache) for cache in own]

    def forward(x_text, x_image):
        return x_text, torch.cat([call(x_text, x)[1] for x, call in zip(x_image.split(image), forwards, strict=True)])

    return forward


def record_step(record, shape, name, case, contestants):
    row = Row("denoise_step", name, case.dtype, "forward", shape.name, case.layout.num_tokens,
              flops=layer_flops(case, backward=False), is_latency=True)  # fmt: skip
    record(row, contestants)


@pytest.mark.parametrize("dtype", shapes.DTYPES[-1:], ids=shapes.dtype_id)
@pytest.mark.parametrize(("image", "context", "branches"), CASES)
def test_denoise_step(record, device, image, context, branches, dtype):
    case, caches = make_denoise_case(SHAPE, branches, image, context, dtype, device)
    ours = inference(case, cached_block(case, caches), mask=case.build_layout)
    contestants = {"ours": ours}
    if branches > 1:
        contestants["ours, one forward a branch"] = inference(case, one_by_one(case, caches, image, context))
    for is_compiled, name in ((True, "slabs, compiled"), (False, "slabs, eager")):
        plain = slabs(case, is_compiled, kv_cache=tuple(cache.clone() for cache in caches)).forward
        contestants[name] = inference(case, plain, is_compiled=is_compiled)
    if device.type == "cuda":
        contestants["ours, CUDA graph"] = graphed(ours)
        contestants["slabs, compiled, CUDA graph"] = graphed(contestants["slabs, compiled"])
    name = f"{image} queries, context {context}, {branches} branch{'es' if branches > 1 else ''}"
    record_step(record, SHAPE, name, case, contestants)


@pytest.mark.parametrize("dtype", shapes.DTYPES[-1:], ids=shapes.dtype_id)
@pytest.mark.parametrize(("batch", "branches"), BATCHES)
@pytest.mark.parametrize("shape", BATCH_SHAPES, ids=str)
def test_denoise_batch(record, device, shape, batch, branches, dtype):
    """Images of several requests in one step, with and without the second branch of guidance."""
    num_documents = batch * branches
    case, caches = make_denoise_case(shape, num_documents, BATCH_IMAGE, BATCH_CONTEXT, dtype, device)
    ours = inference(case, cached_block(case, caches), mask=case.build_layout)
    plain = slabs(case, False, kv_cache=tuple(cache.clone() for cache in caches)).forward
    contestants = {"ours": ours, "slabs, eager": inference(case, plain)}
    if num_documents > 1:
        separate = one_by_one(case, caches, BATCH_IMAGE, BATCH_CONTEXT)
        contestants["ours, one forward a document"] = inference(case, separate)
    if device.type == "cuda":
        contestants["ours, CUDA graph"] = graphed(ours)
    name = f"{batch} image{'s' if batch > 1 else ''} of {BATCH_IMAGE} rows, {'guided' if branches > 1 else 'unguided'}"
    record_step(record, shape, name, case, contestants)

"""What does one layer of a denoising step cost: the tokens of an image (and its two markers) over cached context?

The branches of classifier-free guidance are documents of one batch: 1 (none), 2 (prompt) or 3 (prompt and image). Times
are latencies: the device is idle before each call, as it is for a sampler that waits for nothing but its own launches.
"""

import dataclasses

import pytest
import torch

import lmfusion_kernels as lk
from benchmarks import shapes
from benchmarks.baselines.slabs import slabs
from benchmarks.compare import Contestant, Row, graphed
from benchmarks.layer import frozen, layer_flops, make_case

SHAPE = shapes.BAGEL_7B if shapes.HAS_GPU else shapes.SMOLLM2
CASES = [(image, context, branches) for image in (1024, 4096) for context in (40, 2048) for branches in (1, 2, 3)]
if not shapes.HAS_GPU:
    CASES = [(256, context, branches) for context in (40, 512) for branches in (1, 3)]


def make_denoise_case(image, context, branches, dtype, device):
    """`branches` documents of [BOI, image, EOI], each after `context` cached tokens; the caches hold random rows."""
    documents = [[("marker", 1), ("image", image), ("marker", 1)]] * branches
    case = make_case(SHAPE, documents, dtype, device, frozen_text=True, cached_lengths=[context] * branches,
                     cache_capacity=context + image + 2)  # fmt: skip
    size = (case.layout.num_keys, SHAPE.num_kv_heads, SHAPE.head_dim)
    return frozen(case), tuple(torch.randn(*size, device=device).to(dtype) for _ in range(2))


def cached_block(case, kv_cache):
    def forward(x_text, x_image):
        return lk.routed_block((x_text, x_image), case.layout, case.text, case.image, case.rope, kv_cache=kv_cache)

    return forward


def inference(case, forward, **options):
    """forward(text rows, image rows) without gradients; the caches are written again by every call, alike."""

    def prepare(seed):
        rows = [x.detach() for x in case.rows(seed)]

        @torch.no_grad()
        def call():
            return forward(*rows)

        return call

    return Contestant(prepare, **options)


def one_by_one(case, branches, image, context, caches, dtype, device):
    """Guidance as most samplers do it: a forward a branch, each with its own cache."""
    single, _ = make_denoise_case(image, context, 1, dtype, device)
    single = dataclasses.replace(single, text=case.text, image=case.image)
    capacity = single.layout.num_keys
    own = [tuple(cache[i * capacity : (i + 1) * capacity].clone() for cache in caches) for i in range(branches)]
    forwards = [cached_block(single, cache) for cache in own]

    def forward(x_text, x_image):
        parts = zip(x_text.split(2), x_image.split(image), forwards, strict=True)
        outputs = [call(text, rows) for text, rows, call in parts]
        return torch.cat([text for text, _ in outputs]), torch.cat([rows for _, rows in outputs])

    return forward


@pytest.mark.parametrize("dtype", shapes.DTYPES[-1:], ids=shapes.dtype_id)
@pytest.mark.parametrize(("image", "context", "branches"), CASES)
def test_denoise_step(record, device, image, context, branches, dtype):
    case, caches = make_denoise_case(image, context, branches, dtype, device)
    ours = inference(case, cached_block(case, caches), mask=case.build_layout)
    contestants = {"ours": ours}
    if branches > 1:
        separate = one_by_one(case, branches, image, context, caches, dtype, device)
        contestants["ours, one forward a branch"] = inference(case, separate)
    for is_compiled, name in ((True, "slabs, compiled"), (False, "slabs, eager")):
        plain = slabs(case, is_compiled, kv_cache=tuple(cache.clone() for cache in caches)).forward
        contestants[name] = inference(case, plain, is_compiled=is_compiled)
    if device.type == "cuda":
        contestants["ours, CUDA graph"] = graphed(ours)
        contestants["slabs, compiled, CUDA graph"] = graphed(contestants["slabs, compiled"])
    name = f"{image + 2} queries, context {context}, {branches} branch{'es' if branches > 1 else ''}"
    row = Row("denoise_step", name, dtype, "forward", SHAPE.name, case.layout.num_tokens,
              flops=layer_flops(case, backward=False), is_latency=True)  # fmt: skip
    record(row, contestants)

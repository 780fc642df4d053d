"""Attention under the hybrid mask: each available kernel, and torch's own attention.

Rates count the visible area of the mask: computing other pairs as well earns nothing. torch's attention appears by the
name of its backend. Its keys are expanded to all heads, and its masks and layout are built, outside of the timing.
"""

import pytest
import torch

import lmfusion_kernels as lk
from benchmarks.baselines.sdpa import expanded, folded, sdpa
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row, unavailable_if_refused

SHAPE = shapes.MAIN
# On a CPU there is only one kernel of ours, and Flex has no backward.
KERNELS = ("triton", "flash", "flash-attn-2", "flash-attn-3", "flash-attn-4", "flex") if shapes.HAS_GPU else ()
IN_FLOAT32 = ("causal", "interleaved", "one long image")
FLEX_PATTERNS = ("causal", "interleaved")
"""Flex compiles again for each length and mask, which takes longer than all other rows of a pattern."""
# On a CPU torch has flash, with and without a mask, and the plain formula.
SDPA = (
    [(b, "causal") for b in ("flash", "cudnn", "efficient")]
    + [("flash", "spans"), ("cudnn", "spans"), ("cudnn", "mask"), ("efficient", "mask")]
    if shapes.HAS_GPU
    else [("flash", "causal"), ("flash", "spans"), ("flash", "mask"), ("math", "mask")]
)
BARS = {"flex": 0.67} if shapes.HAS_GPU else {"sdpa flash, causal": 1.0, "sdpa flash, mask": 1.0}
OTHERS = 1.05 if shapes.HAS_GPU else None
"""On a GPU, the chosen kernel promises to be at most this factor slower than any other kernel."""
LEAST_TFLOPS = {"forward": 530.0, "forward+backward": 350.0}
"""TFLOP/s of the interleaved documents on an H200: 350 is 530 forward and 310 backward."""


def is_possible(backend, way, pattern, tokens, direction):
    """is_causal fits only one text document. The plain formula takes seconds on a CPU, so only short rows have it."""
    if way == "causal":
        return pattern == "causal"
    return backend != "math" or (tokens <= 1024 and direction == "forward")


@pytest.mark.parametrize(
    ("pattern", "tokens", "direction", "dtype"),
    shapes.by_dtype(
        shapes.attention_cases(),
        lambda pattern, tokens, way: tokens == 1024 and way != "forward" and pattern in IN_FLOAT32,
    ),
)
def test_hybrid_attention(record, device, pattern, tokens, direction, dtype):
    heads, kv_heads, head_dim = SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim
    documents = shapes.PATTERNS[pattern](tokens)

    def build_layout():
        return lk.TokenLayout.from_spans(documents, frozen_text=False, device=device)

    layout, backward = build_layout(), direction != "forward"

    def draw(seed):
        torch.manual_seed(seed)
        counts = (heads, kv_heads, kv_heads, heads)  # q, k, v and the gradient of the output
        return [torch.randn(layout.num_tokens, n, head_dim, device=device).to(dtype) for n in counts]

    def step(attend, leaves, dout):
        def call():
            if not backward:
                with torch.no_grad():
                    return attend(*leaves)
            out = attend(*leaves)
            return out, *torch.autograd.grad(out, leaves, dout)

        return call

    def kernel(backend=None, **options):
        def prepare(seed):
            *qkv, dout = draw(seed)
            leaves = [x.requires_grad_(backward) for x in qkv]

            def attend(q, k, v):
                return lk.hybrid_attention(q, k, v, layout, backend=backend)

            if backend is not None:
                with unavailable_if_refused(), torch.no_grad():
                    attend(*qkv)
            return step(attend, leaves, dout)

        return Contestant(prepare, mask=build_layout, **options)

    def stock(backend, way):
        def prepare(seed):
            *qkv, dout = draw(seed)
            leaves = [expanded(x, heads).requires_grad_(backward) for x in qkv]
            return step(sdpa(backend, way, documents, layout), leaves, expanded(dout, heads))

        def results(returned):
            parts = returned if backward else [returned]
            return [folded(x, n) for x, n in zip(parts, (heads, heads, kv_heads, kv_heads), strict=False)]

        mask = (lambda: lk.reference.hybrid_mask(layout)) if way == "mask" and tokens <= 16_384 else None
        return Contestant(prepare, results, mask=mask)

    contestants = {"ours": kernel()}
    for name in KERNELS:
        if name != "flex" or (tokens == shapes.NUM_TOKENS and pattern in FLEX_PATTERNS):
            contestants[name] = kernel(name, is_compiled=name == "flex")
    contestants |= {
        f"sdpa {b}, {way}": stock(b, way) for b, way in SDPA if is_possible(b, way, pattern, tokens, direction)
    }
    start, end = layout.key_start.long(), layout.key_end.long()
    area = int((end - start).sum())
    flops = (14.0 if backward else 4.0) * area * heads * head_dim
    set_bytes = layout.num_tokens * (2 * heads + 2 * kv_heads) * head_dim * dtype.itemsize
    bars = {name: bar for name in contestants if name != "ours" and (bar := BARS.get(name, OTHERS)) is not None}
    promises = shapes.HAS_GPU and pattern == "interleaved" and tokens == shapes.NUM_TOKENS
    least = {"tflop_s": LEAST_TFLOPS[direction]} if promises else {}
    row = Row("hybrid_attention", pattern, dtype, direction, SHAPE.name, layout.num_tokens, flops=flops,
              set_bytes=set_bytes, bars=bars, least=least)  # fmt: skip
    record(row, contestants)

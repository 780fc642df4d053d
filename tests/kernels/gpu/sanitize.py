"""Runs every CUDA and Triton kernel once at small odd sizes, under compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/kernels/gpu/sanitize.py [--no-triton]

Inputs are made on the CPU and GEMMs are few, because torch's kernels are checked as well. The tests check values.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from support import DEVICE, DTYPES, ON_GPU, flatten, make_block, random, rope_of, run_block, synchronize

import lmfusion_kernels as lk
from lmfusion_kernels.ops.gate_up_swiglu import FFN_KERNELS

DOCUMENTS = [[("text", 3), ("marker", 1), ("image", 137), ("text", 30)], [("image", 5)]]
CACHED = [[("text", 1)], [("image", 3)]]
ops = torch.ops.lmfusion


def train(function: Callable[..., object], *tensors: Tensor) -> None:
    leaves = [t.requires_grad_() for t in tensors]
    results = flatten(function(*leaves))
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])


def row_ops(dtype: torch.dtype, width: int) -> None:
    for documents in (DOCUMENTS, []):
        layout = lk.TokenLayout.from_spans(documents, device=DEVICE)
        x = random(layout.num_tokens, width, dtype=dtype)
        weights = random(width, dtype=dtype, seed=1), random(width, dtype=dtype, seed=2)
        train(lambda x, t, i, lay=layout: lk.routed_rms_norm(x, t, i, lay, 1e-5), x, *weights)
        train(lambda x, r, t, i, lay=layout: lk.routed_rms_norm(x, t, i, lay, 1e-5, r), x, x.clone(), *weights)
        ops.rms_norm([x], [], *weights, layout.num_text, 1e-5, layout.num_constant, True, True)
        train(layout.to_tower_order, x)
        gate_up = random(layout.num_tokens, 2 * width, dtype=dtype)
        y, _ = ops.swiglu([gate_up], layout.num_constant, True)
        ops.swiglu_backward([y], [gate_up], True)


def rope(dtype: torch.dtype, head_dim: int) -> None:
    layout = lk.TokenLayout.from_spans(DOCUMENTS, device=DEVICE)
    qkv = random(layout.num_tokens, 5 * head_dim, dtype=dtype)
    norms = [random(head_dim, dtype=dtype, seed=i) for i in range(4)]
    train(lambda x, *norms: lk.rope_reorder(x, layout, rope_of(layout, head_dim), 3, *norms), qkv, *norms)
    train(lambda x: lk.rope_reorder(x, layout, rope_of(layout, head_dim), 3), qkv)
    cached = lk.TokenLayout.from_spans(
        CACHED, cached_lengths=[4, 0], cache_starts=[1, 7], cache_slots=14, device=DEVICE
    )
    caches = [torch.zeros(cached.num_keys, 1, head_dim, dtype=dtype, device=DEVICE) for _ in range(2)]
    new = random(cached.num_tokens, 5 * head_dim, dtype=dtype)
    with torch.no_grad():
        ops.rope_reorder_cached(
            [new], *rope_of(cached, head_dim), cached.tower_to_sequence, cached.mask.key, cached.num_text, 3, *norms,
            1e-5, *caches,
        )  # fmt: skip


def attend(dtype: torch.dtype, head_dim: int) -> None:
    """Runs the chosen attention kernel; Triton uses another one for few queries, as with a cache."""
    layout = lk.TokenLayout.from_spans(DOCUMENTS, device=DEVICE)
    k, v = (random(layout.num_tokens, 2, head_dim, dtype=dtype, seed=i) for i in (1, 2))
    q = random(layout.num_tokens, 4, head_dim, dtype=dtype)
    train(lambda q, k, v: lk.hybrid_attention(q, k, v, layout), q, k, v)
    cached = lk.TokenLayout.from_spans(
        CACHED, cached_lengths=[99, 0], cache_starts=[3, 105], cache_slots=120, device=DEVICE
    )
    k, v = (random(cached.num_keys, 2, head_dim, dtype=dtype, seed=i) for i in (1, 2))
    with torch.no_grad():
        lk.hybrid_attention(random(cached.num_tokens, 4, head_dim, dtype=dtype), k, v, cached)


def block(dtype: torch.dtype) -> None:
    layout = lk.TokenLayout.from_spans(DOCUMENTS, device=DEVICE)
    rows = random(layout.num_text, 128, dtype=dtype), random(layout.num_image, 128, dtype=dtype)
    run_block(make_block(dtype, qk_norm=True), rows, layout, rope_of(layout, 64))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-triton", action="store_true", help="the kernels of csrc/cuda alone")
    options = parser.parse_args()
    for dtype in DTYPES if ON_GPU else DTYPES[:2]:
        for width in (1, 33, 1000):
            row_ops(dtype, width)
        for head_dim in (6, 64):
            rope(dtype, head_dim)
    if not options.no_triton:
        for head_dim in (64, 128):
            attend(torch.bfloat16, head_dim)
        for ffn in FFN_KERNELS[:2] if ON_GPU else FFN_KERNELS[:1]:
            os.environ["LMFUSION_KERNELS_FFN"] = ffn
            block(torch.bfloat16)
    synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()

"""RoPE and the reordering to sequence order, with and without QK norm, beside eager and compiled PyTorch."""

import itertools

import pytest
import torch

import lmfusion_kernels as lk
from benchmarks.baselines.slabs import pointwise
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row

ROWS, SHAPE, EPS = shapes.ROW_OP_TOKENS, shapes.MAIN, 1e-6


@pytest.mark.parametrize(
    ("case", "direction", "dtype"),
    shapes.by_dtype(itertools.product(["plain", "QK norm"], shapes.DIRECTIONS), lambda _, way: way != "forward"),
)
def test_rope_reorder(record, device, case, direction, dtype):
    has_norm = case == "QK norm"
    layout = lk.TokenLayout.from_spans([[("text", 256), ("image", 256)]] * (ROWS // 512), device=device)
    heads, kv_heads, head_dim = SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim
    rope = lk.rope_tables(layout.position, 1e4 ** -torch.linspace(0, 1, head_dim // 2, device=device))
    to_sequence, to_tower = layout.sequence_to_tower.long(), layout.tower_to_sequence.long()
    backward = direction != "forward"

    def contestant(reorder, **options):
        def prepare(seed):
            torch.manual_seed(seed)
            qkv = torch.randn(ROWS, SHAPE.qkv_width, device=device).to(dtype).requires_grad_(backward)
            norms = [torch.rand(head_dim, device=device).to(dtype).requires_grad_(backward) for _ in range(4)]
            norms = norms if has_norm else [None] * 4
            dout = [torch.randn(ROWS, n, head_dim, device=device).to(dtype) for n in (heads, kv_heads, kv_heads)]

            def call():
                outputs = reorder(qkv, norms)
                if not backward:
                    return outputs
                return *outputs, *torch.autograd.grad(outputs, [qkv, *(norms if has_norm else [])], dout)

            return call

        return Contestant(prepare, **options)

    def ours(qkv, norms):
        return lk.rope_reorder(qkv, layout, rope, heads, *norms, eps=EPS)

    def plain(parts):
        def reorder(qkv, norms):
            towers = qkv.split([layout.num_text, layout.num_image])
            return parts.heads_in_sequence_order(
                *towers, *rope, to_sequence, to_tower, heads, kv_heads, tuple(norms), EPS
            )

        return reorder

    contestants = {
        "ours": contestant(ours),
        "eager": contestant(plain(pointwise(False))),
        "compiled": contestant(plain(pointwise(True)), is_compiled=True),
    }
    # qkv and q, k, v; their gradients; with norms the backward reads qkv again
    tensors = 2 + (2 + has_norm if backward else 0)
    num_bytes = tensors * ROWS * SHAPE.qkv_width * dtype.itemsize
    row = Row("rope_reorder", case, dtype, direction, SHAPE.name, ROWS,
              num_bytes=num_bytes, bars={"eager": 0.5}, least=shapes.MEMORY_BOUND)  # fmt: skip
    record(row, contestants)

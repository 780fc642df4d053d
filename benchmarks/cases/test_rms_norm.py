"""The routed RMSNorm with and without a residual, beside F.rms_norm and compiled norms."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lmfusion_kernels as lk
from benchmarks.baselines.slabs import pointwise
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row

WIDTH, ROWS, EPS = shapes.MAIN.hidden_size, shapes.ROW_OP_TOKENS, 1e-6


@pytest.mark.parametrize(
    ("case", "direction", "dtype"),
    shapes.by_dtype(itertools.product(["plain", "residual"], shapes.DIRECTIONS), lambda _, way: way != "forward"),
)
def test_rms_norm(record, device, case, direction, dtype):
    has_residual = case == "residual"
    layout = lk.TokenLayout.from_spans([[("text", ROWS // 2), ("image", ROWS // 2)]], frozen_text=False, device=device)

    def contestant(normalise, **options):
        def prepare(seed):
            torch.manual_seed(seed)
            backward = direction != "forward"
            x = torch.randn(ROWS, WIDTH, device=device).to(dtype).requires_grad_(backward)
            residual = torch.randn_like(x).requires_grad_(backward) if has_residual else None
            weights = [torch.rand(WIDTH, device=device).to(dtype).requires_grad_(backward) for _ in range(2)]
            leaves = [x, *([residual] if has_residual else []), *weights]
            dout = [torch.randn_like(x) for _ in range(1 + has_residual)]

            def call():
                outputs = normalise(x, residual, weights)
                if not backward:
                    return outputs
                return *outputs, *torch.autograd.grad(outputs, leaves, dout)

            return call

        return Contestant(prepare, **options)

    def ours(x, residual, weights):
        result = lk.routed_rms_norm(x, *weights, layout, EPS, residual)
        return result if has_residual else (result,)

    def by_tower(norm):
        def normalise(x, residual, weights):
            total = x + residual if has_residual else x
            towers = zip(total.split([layout.num_text, layout.num_image]), weights, strict=True)
            normed = torch.cat([norm(rows, weight) for rows, weight in towers])
            return (normed, total) if has_residual else (normed,)

        return normalise

    compiled = pointwise(True).rms_norm
    contestants = {
        "ours": contestant(ours),
        "F.rms_norm, one a tower": contestant(by_tower(lambda rows, weight: F.rms_norm(rows, (WIDTH,), weight, EPS))),
        "compiled, one a tower": contestant(by_tower(lambda rows, w: compiled(rows, w, EPS)), is_compiled=True),
    }
    tensors = (4 if has_residual else 2) + (0 if direction == "forward" else (4 if has_residual else 3))
    num_bytes = tensors * ROWS * WIDTH * dtype.itemsize  # x, y; residual, sum; x or sum, dy, dx; gradient of the sum
    row = Row("rms_norm", case, dtype, direction, shapes.MAIN.name, ROWS,
              num_bytes=num_bytes, bars={"F.rms_norm, one a tower": 0.6}, least=shapes.MEMORY_BOUND)  # fmt: skip
    record(row, contestants)

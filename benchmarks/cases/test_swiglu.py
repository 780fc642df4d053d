"""SwiGLU beside eager and compiled PyTorch on the halves of one tensor."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.baselines.slabs import pointwise
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row
from lmfusion_kernels.ops.swiglu import swiglu

ROWS, FFN = shapes.ROW_OP_TOKENS, shapes.MAIN.intermediate_size


@pytest.mark.parametrize(("direction", "dtype"), shapes.by_dtype(zip(shapes.DIRECTIONS), lambda way: way != "forward"))
def test_swiglu(record, device, direction, dtype):
    backward = direction != "forward"

    def contestant(activate, **options):
        def prepare(seed):
            torch.manual_seed(seed)
            gate_up = torch.randn(ROWS, 2 * FFN, device=device).to(dtype).requires_grad_(backward)
            dy = torch.randn(ROWS, FFN, device=device).to(dtype)

            def call():
                y = activate(gate_up)
                return (y, *torch.autograd.grad(y, gate_up, dy)) if backward else y

            return call

        return Contestant(prepare, **options)

    def eager(gate_up):
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up

    contestants = {
        "ours": contestant(swiglu),
        "silu(gate) * up": contestant(eager),
        "compiled": contestant(pointwise(True).swiglu, is_compiled=True),
    }
    halves = 8 if backward else 3  # gate, up and y; gate, up, dy and two gradients
    row = Row("swiglu", "", dtype, direction, shapes.MAIN.name, ROWS, num_bytes=halves * ROWS * FFN * dtype.itemsize,
              bars={"silu(gate) * up": 0.65}, least=shapes.MEMORY_BOUND)  # fmt: skip
    record(row, contestants)

"""What does SwiGLU cost, forward and backward, beside eager PyTorch on the halves of one tensor and on two tensors?"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.compare import record
from lmfusion_kernels.swiglu import swiglu

NUM_ROWS, FFN = 4096, 1536


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_swiglu(benchmark, dtype):
    torch.manual_seed(0)
    gate_up = torch.randn(NUM_ROWS, 2 * FFN, dtype=dtype).requires_grad_()
    gate, up = (half.detach().clone().requires_grad_() for half in gate_up.chunk(2, dim=1))
    dy = torch.randn(NUM_ROWS, FFN, dtype=dtype)

    def ours():
        y = swiglu(gate_up, backend="native")
        return y.detach(), *torch.autograd.grad(y, gate_up, dy)

    def eager():
        first, second = gate_up.chunk(2, dim=1)
        y = F.silu(first) * second
        return y.detach(), *torch.autograd.grad(y, gate_up, dy)

    def eager_two_tensors():
        y = F.silu(gate) * up
        return y.detach(), *torch.autograd.grad(y, (gate, up), dy)

    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for result, target in zip(ours(), eager(), strict=True):
        torch.testing.assert_close(result, target, rtol=tolerance, atol=tolerance)
    record(
        benchmark,
        {"ours": ours, "silu(gate) * up": eager, "silu(gate) * up, two tensors": eager_two_tensors},
        "ours",
        {"silu(gate) * up": 0.65},
        num_bytes=8 * dy.numel() * dy.element_size(),  # gate, up and y; dy, gate, up and their gradients
    )

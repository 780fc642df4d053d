"""What does the routed RMSNorm cost, forward and backward with weight gradients, beside F.rms_norm of the same rows?"""

import pytest
import torch
import torch.nn.functional as F

import lmfusion_kernels as lk
from benchmarks.compare import record
from lmfusion_kernels.rms_norm import routed_rms_norm

NUM_ROWS, WIDTH, EPS = 4096, 576, 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rms_norm(benchmark, dtype):
    torch.manual_seed(0)
    layout = lk.TokenLayout.from_spans([[("text", NUM_ROWS // 2), ("image", NUM_ROWS // 2)]])
    x, dy = torch.randn(2, NUM_ROWS, WIDTH, dtype=dtype).unbind()
    weight = torch.rand(WIDTH, dtype=dtype)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), weight.clone().requires_grad_()]
    plain = [x.clone().requires_grad_(), weight.clone().requires_grad_()]

    def ours():
        normed = routed_rms_norm(*leaves, layout, EPS, backend="native")
        return normed.detach(), *torch.autograd.grad(normed, leaves, dy)

    def torch_rms_norm():
        normed = F.rms_norm(plain[0], (WIDTH,), plain[1], EPS)
        return normed.detach(), *torch.autograd.grad(normed, plain, dy)

    (normed, dx, dtext, dimage), expected = ours(), torch_rms_norm()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for result, target in zip((normed, dx, dtext + dimage), expected, strict=True):
        torch.testing.assert_close(result, target, rtol=tolerance, atol=tolerance * target.abs().max().item())
    num_bytes = 5 * x.numel() * x.element_size()  # x and y; x, dy and dx
    record(benchmark, {"ours": ours, "F.rms_norm": torch_rms_norm}, "ours", {"F.rms_norm": 0.35}, num_bytes=num_bytes)

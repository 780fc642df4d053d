"""SwiGLU equals torch's silu at gates of every kind, including infinite and NaN, forward and backward."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from tests.kernels.ops.row_ops import needs_native

LARGEST, TINY = torch.finfo(torch.float32).max, 1e-38
UPS = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, TINY, LARGEST)
DYS = (1.0, -1.0, 0.0, math.inf, math.nan, LARGEST)


def of_bits(bits, dtype=torch.float32):
    """The numbers with these bit patterns."""
    integers = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}[dtype]
    signed = torch.from_numpy(np.asarray(bits).astype(integers).view(f"i{np.dtype(integers).itemsize}"))
    return signed.view(dtype)


def every_16_bit_gate(dtype):
    return of_bits(np.arange(1 << 16), dtype)


def float32_gates(stride):
    """Every stride-th bit pattern, and all around where something ends: numbers, exp, the sigmoid's digits."""
    borders = np.array(
        [0.0, 1.2784645, 16.63553, 87.33654, 88.0, 88.02969, 88.37626, 88.72283, 89.0, 103.97, 128.0, LARGEST]
    )
    near = [int(x.view(np.uint32)) + np.arange(-300, 300) for x in borders.astype(np.float32)]
    near.append(np.arange(0x7F800000 - 300, 0x7F800000 + 300))  # the largest numbers, infinity, NaN
    positive = np.concatenate([np.arange(0, 1 << 31, stride), *near]) % (1 << 31)
    return of_bits(np.concatenate([positive, positive | 1 << 31]))


def assert_equals_torch(swiglu, swiglu_backward, gate, ups=UPS, dys=DYS):
    """Forward and both gradients for each pair of up and dy: NaN, infinity and zero where torch has them."""
    for up, dy in itertools.product(ups, dys):
        values = (v if math.isinf(v) else min(v, torch.finfo(gate.dtype).max) for v in (up, dy))
        u, grad = (torch.full_like(gate, v) for v in values)
        leaves = [x.float().requires_grad_() for x in (gate, u)]
        product = F.silu(leaves[0]) * leaves[1]
        dgate, dup = torch.autograd.grad(product, leaves, grad.float())
        gate_up = torch.stack([gate, u], 1).reshape(len(gate), 2)
        y = swiglu(gate_up)
        dgate_up, again = swiglu_backward(grad[:, None], gate_up)
        assert torch.equal(y.view(torch.uint8), again.view(torch.uint8)) or y.isnan().any()
        # The slope of silu goes through 0 where rounding leaves something of a difference of about 1.
        slack = (grad.float() * u.float()).abs().nan_to_num(0.0, 0.0) * 1e-6
        for what, ours, theirs, atol in (
            ("y", y[:, 0], product.detach(), 0.0),
            ("dgate", dgate_up[:, 0], dgate, slack),
            ("dup", dgate_up[:, 1], dup, 0.0),
        ):
            assert_close(f"{what} for up {up} and dy {dy}", gate, ours, theirs, atol)


def assert_close(what, gate, ours, theirs, atol):
    info = torch.finfo(ours.dtype)
    target = theirs.to(ours.dtype)
    wrong = ours.isnan() != target.isnan()
    # Rounding may carry a number across the border to infinity, which is next to the largest number here.
    a, b = (x.double().clamp(-info.max, info.max) for x in (ours, target))
    wrong |= (a - b).abs() > 2e-6 * b.abs() + (
        info.eps * b.abs() if info.bits == 16 else 0
    ) + atol + info.smallest_normal * info.eps
    steep = gate.float().sub(-1.2784645).abs() > 1e-5  # elsewhere the sign of the slope is a matter of rounding
    wrong &= steep | ~target.isinf()
    at = wrong.nonzero().flatten()[:5].tolist()
    assert not at, f"{what}: " + "; ".join(f"gate {gate[i]}: {ours[i]}, torch {target[i]}" for i in at)


def native(gate_up):
    return torch.ops.lmfusion.swiglu([gate_up])[0]


def native_backward(dy, gate_up):
    return torch.ops.lmfusion.swiglu_backward([dy], [gate_up], True)


@needs_native
def test_every_bfloat16_gate():
    assert_equals_torch(native, native_backward, every_16_bit_gate(torch.bfloat16))


@needs_native
def test_float32_gates_of_all_magnitudes():
    assert_equals_torch(native, native_backward, float32_gates(1 << 12))


@needs_native
def test_every_float32_gate_where_exp_ends():
    low, high = (int(np.float32(x).view(np.uint32)) for x in (87.2, 89.0))
    gate = of_bits(np.arange(low, high) | 1 << 31)
    assert_equals_torch(native, native_backward, gate, ups=(1.0, math.inf, LARGEST), dys=(1.0, math.inf))

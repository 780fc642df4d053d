"""RMSNorm and RoPE treat infinite, NaN, zero, huge and tiny rows as plain PyTorch does, forward and backward."""

import itertools
import math

import pytest
import torch

import lmfusion_kernels as lk
from lmfusion_kernels.ops.rms_norm import routed_rms_norm
from lmfusion_kernels.ops.rope_reorder import rope_reorder
from tests.kernels.ops.row_ops import flatten, needs_native

DTYPES = [torch.float32, torch.bfloat16]
INF, NAN = math.inf, math.nan
LARGE = 3.3e38

ROWS = {
    "inf": [1, INF, 2, 3],
    "-inf": [1, -INF, 2, 3],
    "both": [INF, -INF, 1, 2],
    "nan": [1, NAN, 2, 3],
    "zeros": [0, 0, 0, 0],
    "negative zeros": [-0.0, 0, -0.0, 0],
    "one zero": [0, 1, 2, 3],
    "a square overflows": [1e20, 1, -1e20, 2],
    "the sum overflows": [1.2e19, 1.3e19, 1.4e19, 1.5e19],
    "largest": [LARGE, 1, LARGE, -LARGE],
    "tiny": [1e-20, 2e-20, 0, 1e-20],
    "denormal": [1e-40, 2e-40, 0, -1e-42],
    "mixed": [1e8, 1e-8, 1, 0],
}
WEIGHTS = {"ones": [1, 1, 1, 1], "inf": [1, INF, 1, 1], "nan": [NAN, 1, 1, 1], "zeros": [0, 1, 0, 1]}
GRADS = {"plain": [1, -2, 0.5, 3], "inf": [1, INF, 1, 1], "nan": [1, 1, NAN, 1], "zeros": [0, 0, 0, 0]}


def outcome(op, inputs, grads):
    """Results and gradients of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = flatten(op(*leaves))
    return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves, grads)]


def assert_same_kind(what, ours, theirs):
    """NaN and infinity where the other has them; numbers to what rounding leaves of the largest in a sum."""
    tolerance = 200 * torch.finfo(ours.dtype).eps
    largest = theirs.float().abs().nan_to_num(0.0, 0.0).max().item()
    # Vectorised code of torch's may drop denormal numbers.
    torch.testing.assert_close(
        ours,
        theirs,
        rtol=tolerance,
        atol=tolerance * largest + 1e-37,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def check_rms_norm(dtype, num_copies, residual=False):
    """Rows of `num_copies` times the four numbers. dx of the largest numbers is left out: sums of them overflow or not
    as the order has it, in plain PyTorch too."""
    layout = lk.TokenLayout.from_spans([[("image", 1)]])
    for (row, x), (weight, w), (grad, dy) in itertools.product(ROWS.items(), WEIGHTS.items(), GRADS.items()):
        inputs = [torch.tensor(values * num_copies, dtype=dtype) for values in (x, w)]
        inputs[0] = inputs[0][None]
        grads = [torch.tensor(dy * num_copies, dtype=dtype)[None]]
        if residual:
            inputs.append(torch.zeros_like(inputs[0]))
            grads.append(torch.zeros_like(grads[0]))

        def op(x, w, added=None, backend="native"):
            return routed_rms_norm(x, w, w, layout, 1e-5, added, backend=backend)

        ours = outcome(op, inputs, grads)
        theirs = outcome(lambda *x: op(*x, backend="reference"), inputs, grads)
        for name, a, b in zip(("y", *["sum"] * residual, "dx", "dweight", "dresidual"), ours, theirs, strict=False):
            if name in ("dx", "dresidual") and row == "largest":
                continue
            assert_same_kind(f"{name} of {row}, weight {weight}, dy {grad}", a, b)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_copies", "residual"), [(1, False), (9, False), (8, True)])
def test_rms_norm(num_copies, residual, dtype):
    check_rms_norm(dtype, num_copies, residual)


@needs_native
@pytest.mark.parametrize("size", [1e17, 1e18])
def test_gradients_of_rms_norm_of_huge_rows(size):
    """Against float64: plain PyTorch has a factor rstd^3, which is 0 in float32."""
    layout = lk.TokenLayout.from_spans([[("image", 1)]])
    inputs = [size * torch.tensor([[1.0, 2.0, -3.0, 0.5] * 4]), torch.ones(16)]
    grads = [torch.tensor([[1.0, -2.0, 0.5, 3.0] * 4])]
    ours = outcome(lambda x, w: routed_rms_norm(x, w, w, layout, 1e-5, backend="native"), inputs, grads)
    exact = outcome(
        lambda x, w: routed_rms_norm(x, w, w, layout, 1e-5, backend="reference"),
        [x.double() for x in inputs],
        [x.double() for x in grads],
    )
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


def rope_layout():
    return lk.TokenLayout.from_spans([[("text", 2), ("image", 3)]], frozen_text=False)


def check_rope(layout, dtype, head_dim, has_norms):
    """Two of the five rows of `rope_layout()` hold numbers of every kind in turn."""
    rope = lk.rope_tables(layout.position, 1e4 ** -torch.linspace(0, 1, head_dim // 2))
    width = 4 * head_dim
    for row, values in ROWS.items():
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(5, width, generator=generator)
        qkv[1::2, :] = torch.tensor(values * width)[:width]
        norms = [torch.ones(head_dim, dtype=dtype) for _ in range(4)] if has_norms else []

        def op(qkv, *norms, backend="native"):
            return rope_reorder(qkv, layout, rope, 2, *norms, eps=1e-5, backend=backend)

        grads = [torch.randn(5, heads, head_dim, generator=generator).to(dtype) for heads in (2, 1, 1)]
        inputs = [qkv.to(dtype), *norms]
        ours = outcome(op, inputs, grads)
        theirs = outcome(lambda *x: op(*x, backend="reference"), inputs, grads)
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if has_norms and index == 3 and row == "largest":  # see check_rms_norm
                continue
            assert_same_kind(f"{row}, {index}", a, b)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norms", [False, True], ids=["no norms", "norms"])
@pytest.mark.parametrize("head_dim", [8, 10, 64])
def test_rope(head_dim, has_norms, dtype):
    check_rope(rope_layout(), dtype, head_dim, has_norms)

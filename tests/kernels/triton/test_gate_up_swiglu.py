"""The Triton GEMM with SwiGLU in its epilogue computes both towers' hidden activations, alone and in the block."""

import os
from unittest import mock

import pytest
import torch

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from tests.kernels.block.test_routed_block import DOCUMENTS, make_block, make_inputs, run
from tests.kernels.ops.row_ops import make_layout, needs_native, random
from tests.kernels.ops.row_ops import run as run_op
from tests.kernels.triton import interpreter

pytest.importorskip("triton", reason="triton is not installed")

MODULE = "lmfusion_kernels.triton.gate_up_swiglu"
# (text rows, image rows, constant rows): within a tile, across its border, one or no row, nothing kept of a tower
ROWS = [(40, 33, 7), (130, 20, 129), (130, 65, 64), (64, 64, 0), (0, 5, 0), (5, 0, 5), (1, 1, 1), (0, 0, 0)]


def forward(*arguments, tile=(64, 32, 32)):
    """`forward` with small tiles, so that a program has several; runs in the interpreter's process."""
    from lmfusion_kernels.triton import gate_up_swiglu as kernel

    return kernel.forward(*arguments, kernel.Configuration(*tile, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("keep", [True, False], ids=["keep", ""])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_equals_reference(rows, keep, dtype):
    num_text, num_image, num_constant = rows
    x = [random(num_text, 48, dtype=dtype), random(num_image, 72, seed=1, dtype=dtype)]
    weights = [random(2 * 72, 48, seed=2, dtype=dtype, scale=0.3), random(2 * 40, 72, seed=3, dtype=dtype, scale=0.3)]
    hidden, gate_up = interpreter.call(__name__, "forward", x, weights, num_constant, keep)
    assert len(gate_up) == (2 if keep else 0)
    for i, first in enumerate((num_constant, 0)):
        exact_gate_up = x[i].double() @ weights[i].double().t()
        plain_gate_up = x[i] @ weights[i].t()
        pairs = [(hidden[i], reference.swiglu(plain_gate_up), reference.swiglu(exact_gate_up))]
        if keep:
            pairs.append((gate_up[i], plain_gate_up[first:], exact_gate_up[first:]))
        for result, plain, exact in pairs:
            assert result.shape == exact.shape and result.dtype == dtype
            if exact.numel():
                floor = 4 * torch.finfo(dtype).eps * exact.abs().max()
                error, plain_error = ((t.double() - exact).abs().max() for t in (result, plain))
                assert error <= 2 * plain_error + floor


@pytest.mark.parametrize("tile", [(16, 16, 16), (128, 128, 64), (32, 64, 16)], ids=str)
def test_tiles_of_any_size_give_the_same(tile):
    x = [random(150, 32), random(70, 32, seed=1)]
    weights = [random(2 * 96, 32, seed=2), random(2 * 96, 32, seed=3)]
    hidden, gate_up = interpreter.call(__name__, "forward", x, weights, 100, True, tile=tile)
    for i, first in enumerate((100, 0)):
        torch.testing.assert_close(gate_up[i], (x[i] @ weights[i].t())[first:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(hidden[i], reference.swiglu(x[i] @ weights[i].t()), rtol=1e-4, atol=1e-4)


def test_configurations_fit_the_device():
    found = interpreter.call(__name__, "shared_memory")
    assert all(bytes_needed <= limit for bytes_needed, limit in found) and found


def shared_memory():
    """Bytes of the pipeline's tiles and of a result, and of shared memory per program, for each configuration."""
    from lmfusion_kernels.triton import gate_up_swiglu as kernel

    return [
        (2 * ((c.rows + 2 * c.columns) * c.depth * c.num_stages + c.rows * c.columns), 227 * 1024)
        for c in kernel.configurations(2)
    ]


def run_block(recompute, frozen_text, paired):
    """Outputs and gradients of the block with the kernel and without it."""
    block = make_block(frozen_text=frozen_text)
    layout = lk.TokenLayout.from_spans(DOCUMENTS, frozen_text=frozen_text)
    x, rope = make_inputs(layout, torch.float32, paired=paired)
    results = []
    for kernel in ("triton", "two-calls"):
        with mock.patch.dict(os.environ, {"LMFUSION_KERNELS_FFN": kernel}):
            outcome = run(block, x, layout, rope, "native", recompute=recompute)
            results.append({name: value.detach() for name, value in outcome.items()})
    return results


def run_routed_swiglu(paired, frozen, has_compiler):
    """Result and gradients of the op with the kernel and without it."""
    layout = make_layout("mixed")
    shapes = {"text_gate_up": (96, 32), "text_down": (32, 48), "image_gate_up": (80, 32), "image_down": (32, 40)}
    counts = {"x_text": layout.num_text, "x_image": layout.num_image} if paired else {"x": layout.num_tokens}
    shapes |= {name: (num_rows, 32) for name, num_rows in counts.items()}
    tensors = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}

    def op(text_gate_up, text_down, image_gate_up, image_down, x=None, x_text=None, x_image=None):
        rows = (x_text, x_image) if x is None else x
        return lk.routed_swiglu(rows, text_gate_up, text_down, image_gate_up, image_down, layout, backend="native")

    results = []
    for kernel in ("triton", "two-calls"):
        with mock.patch.dict(os.environ, {"LMFUSION_KERNELS_FFN": kernel}):
            torch._dynamo.reset()
            call = torch.compile(op, fullgraph=True, backend="aot_eager") if has_compiler else op
            results.append(run_op(call, tensors, frozen))
    return results


@needs_native
@pytest.mark.parametrize("frozen", [[], ["text_gate_up"], ["x", "text_gate_up", "image_gate_up"]], ids=str)
@pytest.mark.parametrize("paired", [True, False], ids=["pair", "one tensor"])
@pytest.mark.parametrize("has_compiler", [False, True], ids=["", "compiled"])
def test_in_the_feed_forward_network(has_compiler, paired, frozen):
    ours, expected = interpreter.call(__name__, "run_routed_swiglu", paired, frozen, has_compiler)
    for name, target in expected.items():
        torch.testing.assert_close(ours[name], target, rtol=1e-4, atol=1e-4, msg=name)


@needs_native
@pytest.mark.parametrize("recompute", ["none", "ffn"])
@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("paired", [True, False], ids=["pair", "one tensor"])
def test_in_the_block(paired, frozen_text, recompute):
    ours, expected = interpreter.call(__name__, "run_block", recompute, frozen_text, paired)
    for name, target in expected.items():
        torch.testing.assert_close(ours[name], target, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_gates_are_those_of_silu(sign):
    """Gates from the smallest number to infinity with ups of every kind. Infinities and NaNs agree with PyTorch."""
    powers = torch.arange(-126, 128, 3).double().exp2().float()
    others = [0.0, 1.0, 16.0, 87.0, 88.0, 88.8, 89.0, 103.0, 104.0, 127.0, 1e30, 3.4e38, float("inf"), float("nan")]
    gates = sign * torch.cat([powers, torch.tensor(others)])
    x, no_rows = torch.zeros(1, 16), torch.zeros(0, 16)
    x[0, 0] = 1.0
    for up in (1.0, -1.0, 0.0, 3e38, -3e38, 1e-38, float("inf"), float("-inf"), float("nan")):
        weights = torch.zeros(2 * 112, 16)
        weights[: gates.numel(), 0], weights[112:, 0] = gates, up
        (hidden, _), _ = interpreter.call(__name__, "forward", [x, no_rows], [weights, weights], 0, False)
        gate, value = (x @ weights.t()).split(112, dim=1)
        expected = torch.nn.functional.silu(gate) * value
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=0.0, equal_nan=True)

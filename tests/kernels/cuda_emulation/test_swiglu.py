"""The CUDA SwiGLU is right, forward and backward, for any width, number of rows, alignment and both towers."""

import math

import pytest
import torch

from lmfusion_kernels.ops.swiglu import swiglu
from tests.kernels.cuda_emulation.device import make_layout
from tests.kernels.ops import test_swiglu as on_cpu
from tests.kernels.ops import test_swiglu_extremes as extremes
from tests.kernels.ops.row_ops import LAYOUTS, assert_as_good_as_reference, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ops = torch.ops.lmfusion_emulated


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inner"), [(0, 8), (1, 1), (5, 37), (1, 64), (40, 64), (3, 1032), (2, 4095), (2, 14336)]
)
def test_equals_reference(cuda_ops, rows, inner, dtype):
    gate_up = random(rows, 2 * inner, dtype=dtype, scale=4.0)
    assert_as_good_as_reference(lambda backend, gate_up: swiglu(gate_up, backend=backend), {"gate_up": gate_up})
    assert cuda_ops.launched() == (["swiglu_kernel", "swiglu_backward_kernel"] if rows else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["one tensor", "pair", "uneven"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_routed_swiglu_equals_reference(cuda_ops, name, form, dtype):
    layout = make_layout(name)
    assert_as_good_as_reference(on_cpu.make_op(layout), on_cpu.make_tensors(layout, dtype, form))
    assert len(cuda_ops.launched()) <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_towers_of_two_widths_in_one_launch(cuda_ops, dtype):
    gate_up = [random(7, 2 * 1000, dtype=dtype), random(9, 2 * 24, dtype=dtype, seed=1)]
    both, alone = ops.swiglu(gate_up), [ops.swiglu([tower])[0] for tower in gate_up]
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    assert len(cuda_ops.launched()) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_rows_that_start_anywhere(cuda_ops, offset, dtype):
    storage = random(offset + 6 * 128, dtype=dtype)
    gate_up = storage[offset:].view(6, 128)
    assert gate_up.data_ptr() % 64 == offset * gate_up.element_size() % 64
    for result, expected in ((ops.swiglu, gate_up), (ops.swiglu, gate_up.clone())):
        torch.testing.assert_close(result([expected])[0], swiglu(gate_up, backend="reference"), rtol=1e-2, atol=1e-2)
    dy = random(1 + 6 * 64, dtype=dtype, seed=1)[1:].view(6, 64)
    (ours,) = ops.swiglu_backward([dy], [gate_up], False)
    (aligned,) = ops.swiglu_backward([dy.clone()], [gate_up.clone()], False)
    assert torch.equal(ours, aligned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_constant", [0, 3, 5])
@pytest.mark.parametrize("width", [37, 64])
def test_kept_rows(cuda_ops, width, num_constant, dtype):
    gate_up = [random(5, 2 * width, dtype=dtype), random(4, 2 * width, dtype=dtype, seed=1)]
    text, image, kept = ops.swiglu(gate_up, num_constant, True)
    assert torch.equal(kept, gate_up[0][num_constant:])
    assert kept.untyped_storage().data_ptr() != gate_up[0].untyped_storage().data_ptr()
    assert [torch.equal(a, b) for a, b in zip(ops.swiglu(gate_up), (text, image), strict=True)] == [True, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_recompute_gives_the_forward_back(cuda_ops, dtype):
    gate_up, dy = random(5, 72, dtype=dtype), random(5, 36, dtype=dtype, seed=1)
    dgate_up, y = ops.swiglu_backward([dy], [gate_up], True)
    assert torch.equal(y, ops.swiglu([gate_up])[0])
    assert torch.equal(dgate_up, ops.swiglu_backward([dy], [gate_up], False)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_gates(cuda_ops, dtype):
    gate = torch.tensor([-3e38, -1e4, -90.0, 0.0, 90.0, 1e4, torch.inf, torch.nan]).to(dtype)
    gate_up = torch.stack([gate, torch.ones_like(gate)], 1).clone()
    expected = swiglu(gate_up, backend="reference")
    torch.testing.assert_close(ops.swiglu([gate_up])[0], expected, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_of_every_kind(cuda_ops, dtype):
    if dtype == torch.float32:
        gate = extremes.float32_gates(1 << 20)
    else:
        gate = extremes.every_16_bit_gate(dtype)[::7]
        ends = [-89.0, -88.5, -88.0, -87.5, -87.0, math.inf, -math.inf, math.nan]
        gate = torch.cat([gate, torch.tensor(ends).to(dtype)])
    extremes.assert_equals_torch(
        lambda gate_up: ops.swiglu([gate_up])[0],
        lambda dy, gate_up: ops.swiglu_backward([dy], [gate_up], True),
        gate,
        ups=(1.0, -0.0, math.inf, math.nan, extremes.LARGEST),
        dys=(1.0, math.inf),
    )


def test_results_do_not_depend_on_the_order_of_blocks(cuda_ops):
    gate_up, dy = random(33, 2 * 1000), random(33, 1000, seed=1)
    results = []
    for seed in range(3):
        cuda_ops.seed(seed)
        results.append([*ops.swiglu([gate_up]), *ops.swiglu_backward([dy], [gate_up], True)])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_wrong_arguments_are_errors_here_too(cuda_ops):
    for bad in (random(3, 7), random(3, 8).double(), random(8)):
        with pytest.raises(RuntimeError, match="gate_up must"):
            ops.swiglu([bad])

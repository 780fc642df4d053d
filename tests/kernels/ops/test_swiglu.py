"""SwiGLU and the routed feed-forward networks, forward and backward, up to the range of exp."""

import math

import pytest
import torch
import torch.nn.functional as F

from lmfusion_kernels.ops.swiglu import routed_swiglu, swiglu
from tests.kernels.ops.row_ops import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_compiles,
    make_layout,
    needs_native,
    random,
)

DTYPES = [torch.float32, torch.bfloat16]


def make_tensors(layout, dtype, form, width=37, inner=19):
    """Arguments by name. Forms: "one tensor", "pair" (narrow image tower), "uneven" (one tensor, two FFN widths)."""
    image_width, image_inner = {"one tensor": (width, inner), "pair": (24, 10), "uneven": (width, 10)}[form]
    sizes = {
        "text_gate_up": (2 * inner, width),
        "text_down": (width, inner),
        "image_gate_up": (2 * image_inner, image_width),
        "image_down": (image_width, image_inner),
    }
    if form == "pair":
        sizes |= {"x_text": (layout.num_text, width), "x_image": (layout.num_image, image_width)}
    else:
        sizes["x"] = (layout.num_tokens, width)
    return {name: random(*size, seed=i, dtype=dtype, scale=0.5) for i, (name, size) in enumerate(sizes.items())}


def make_op(layout):
    def op(backend, text_gate_up, text_down, image_gate_up, image_down, x=None, x_text=None, x_image=None):
        rows = (x_text, x_image) if x is None else x
        return routed_swiglu(rows, text_gate_up, text_down, image_gate_up, image_down, layout, backend=backend)

    return op


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
@pytest.mark.parametrize("inner", [1, 37, 64])
def test_swiglu_equals_reference(inner, rows, dtype):
    gate_up = random(rows, 2 * inner, dtype=dtype, scale=4.0)
    assert_as_good_as_reference(lambda backend, gate_up: swiglu(gate_up, backend=backend), {"gate_up": gate_up})


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["one tensor", "pair", "uneven"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_routed_swiglu_equals_reference(name, form, dtype):
    layout = make_layout(name)
    assert_as_good_as_reference(make_op(layout), make_tensors(layout, dtype, form))


@needs_native
@pytest.mark.parametrize("form", ["one tensor", "pair"])
@pytest.mark.parametrize("frozen", [["text_gate_up", "text_down"], ["image_down", "x", "x_text"]], ids=str)
def test_frozen_tensors_get_no_gradient(frozen, form):
    layout = make_layout("mixed")
    assert_as_good_as_reference(make_op(layout), make_tensors(layout, torch.float32, form), frozen)


@needs_native
def test_sigmoid_is_accurate_over_the_whole_range():
    """Relative error against float64 at all gates whose sigmoid is a normal float32 number; beyond, 0 or 1."""
    gate = torch.linspace(-100, 100, 400_001)
    up = torch.ones_like(gate)
    native = swiglu(torch.stack([gate, up], 1), backend="native").flatten().double()
    exact = F.silu(gate.double())
    # Rounding 1 + exp(-gate), the quotient and the product alone can make 1.5 of this; PyTorch's own comes to 1.5.
    tolerance = 1.8 * torch.finfo(torch.float32).eps
    assert ((native - exact).abs() <= tolerance * exact.abs() + 1e-36).all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_gates(dtype):
    gate = torch.tensor([-3e38, -1e4, -90.0, 0.0, 90.0, 1e4, 3e38, math.inf, math.nan], dtype=dtype)
    gate_up = torch.stack([gate, torch.ones_like(gate)], 1).requires_grad_()
    y = swiglu(gate_up, backend="native")
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(y.flatten(), F.silu(gate), equal_nan=True)
    slope = gate_up.grad[:, 0]
    assert torch.equal(slope[:7], torch.tensor([0, 0, 0, 0.5, 1, 1, 1], dtype=dtype))
    assert slope[-1].isnan()


@needs_native
@pytest.mark.parametrize(
    ("gate", "up", "rounded"),
    [(29, 9, 260), (37, 7, 260), (29, -9, -260), (31, 17, 528), (100, math.nan, math.nan), (100, -math.inf, -math.inf)],
)
def test_bfloat16_rounds_to_nearest_even(gate, up, rounded):
    """29 * 9 = 261 and 37 * 7 = 259 lie between two bfloat16 numbers; 31 * 17 = 527 is nearer to 528 than to 524."""
    gate_up = torch.tensor([[gate] * 33 + [up] * 33], dtype=torch.bfloat16)
    expected = torch.full((1, 33), rounded, dtype=torch.bfloat16)
    torch.testing.assert_close(swiglu(gate_up, backend="native"), expected, rtol=0, atol=0, equal_nan=True)


@needs_native
def test_rows_that_are_not_contiguous():
    gate_up = random(64, 50).t()
    torch.testing.assert_close(swiglu(gate_up, backend="native"), swiglu(gate_up, backend="reference"))


@needs_native
@pytest.mark.parametrize("count", [1, 2])
def test_schema_fake_and_autograd(count):
    ops = torch.ops.lmfusion
    gate_ups = [random(5, 74).requires_grad_(), random(3, 20).requires_grad_()][:count]
    torch.library.opcheck(ops.swiglu.default, (gate_ups,))
    dy = [random(5, 37), random(3, 10)][:count]
    for recompute in (False, True):
        torch.library.opcheck(ops.swiglu_backward.default, (dy, [t.detach() for t in gate_ups], recompute))


@needs_native
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("num_constant", [0, 2, 5])
def test_kept_rows_are_a_copy_without_gradient(num_constant, count):
    op = torch.ops.lmfusion.swiglu
    gate_ups = [random(5, 74).requires_grad_(), random(3, 20).requires_grad_()][:count]
    *results, kept = op(gate_ups, num_constant, True)
    plain = op(gate_ups)
    assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))
    assert torch.equal(kept, gate_ups[0][num_constant:])
    assert not kept.requires_grad
    assert kept.untyped_storage().data_ptr() != gate_ups[0].untyped_storage().data_ptr()
    torch.library.opcheck(op.default, (gate_ups, num_constant, True))
    for kept_grad, grad in zip(grads(results, gate_ups), grads(plain, gate_ups), strict=True):
        assert torch.equal(kept_grad, grad)


def grads(results, inputs):
    return torch.autograd.grad(results, inputs, [random(*t.shape, seed=5) for t in results])


@needs_native
def test_recompute_gives_the_forward_back():
    gate_up = random(5, 74)
    _, again = torch.ops.lmfusion.swiglu_backward([random(5, 37)], [gate_up], True)
    torch.testing.assert_close(again, torch.ops.lmfusion.swiglu([gate_up])[0], rtol=1e-6, atol=0)


@needs_native
@pytest.mark.parametrize("form", ["one tensor", "pair", "uneven"])
def test_compiles_to_one_graph(form):
    layout = make_layout("mixed")
    assert_compiles(make_op(layout), make_tensors(layout, torch.float32, form))


def test_reference_gradients():
    layout = make_layout("mixed")
    tensors = make_tensors(layout, torch.float64, "pair", width=3, inner=2)
    names = list(tensors)

    def op(*values):
        return make_op(layout)("reference", **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(op, [tensor.requires_grad_() for tensor in tensors.values()], fast_mode=True)


def test_without_native_ops(monkeypatch):
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "reference")
    layout = make_layout("mixed")
    tensors = make_tensors(layout, torch.float32, "one tensor")
    result = make_op(layout)(None, **tensors)
    gate, up = (tensors["x"][: layout.num_text] @ tensors["text_gate_up"].t()).chunk(2, dim=1)
    torch.testing.assert_close(result[: layout.num_text], (F.silu(gate) * up) @ tensors["text_down"].t())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_gate_up": random(38, 36)}, r"text_gate_up must be \[\*, 37\] .*, got shape \(38, 36\)"),
        ({"image_down": random(37, 18)}, "for every column of image_down, got 38 rows and 18 columns"),
        (
            {"text_down": random(37, 19, dtype=torch.bfloat16)},
            r"text_down must be in the rows' dtype .*bfloat16",
        ),
        ({"image_gate_up": random(38, 37).to("meta")}, "image_gate_up must be on the rows' device cpu, got meta"),
        ({"x": random(63, 37)}, "must have 64 rows for this layout"),
    ],
)
def test_wrong_arguments(change, message):
    layout = make_layout("mixed")
    right = make_tensors(layout, torch.float32, "one tensor")
    with pytest.raises(ValueError, match=message):
        routed_swiglu(**right | change, layout=layout)


@pytest.mark.parametrize("shape", [(4, 7), (8,), (2, 3, 4)])
def test_wrong_gate_up(shape):
    with pytest.raises(ValueError, match=r"gate_up must be \[N, 2 I\]"):
        swiglu(random(*shape))


@needs_native
def test_native_op_checks_its_arguments():
    with pytest.raises(RuntimeError, match=r"gate_up must have shape \[rows, 2 I\].*, got \[4, 7\]"):
        torch.ops.lmfusion.swiglu([random(4, 7)])
    with pytest.raises(RuntimeError, match=r"dy must have shape \[4, 4\], got \[4, 8\]"):
        torch.ops.lmfusion.swiglu_backward([random(4, 8)], [random(4, 8)], False)
    with pytest.raises(RuntimeError, match="gate_up must be float32 or bfloat16"):
        torch.ops.lmfusion.swiglu([random(4, 8).double()])
    with pytest.raises(RuntimeError, match=r"num_constant must be in \[0, num_text\] = \[0, 4\], got 5"):
        torch.ops.lmfusion.swiglu([random(4, 8)], 5, True)
    with pytest.raises(RuntimeError, match="gate_up must have dtype Float, got BFloat16"):
        torch.ops.lmfusion.swiglu([random(4, 8), random(4, 8, dtype=torch.bfloat16)])

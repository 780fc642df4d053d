"""Every row goes through the projection of its own tower, and frozen weights get no gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode

import lmfusion_kernels as lk
from lmfusion_kernels.ops import linear
from lmfusion_kernels.ops.linear import routed_linear
from lmfusion_kernels.ops.rms_norm import routed_rms_norm
from lmfusion_kernels.ops.rope_reorder import rope_reorder
from lmfusion_kernels.ops.swiglu import routed_swiglu
from tests.kernels.ops.row_ops import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_compiles,
    make_layout,
    needs_native,
    random,
)

DTYPES = [torch.float32, torch.bfloat16]


def make_tensors(layout, dtype, paired, bias, width=37, out=24):
    image_width, image_out = (20, 18) if paired else (width, out)
    sizes = {"text_weight": (out, width), "image_weight": (image_out, image_width)}
    if bias:
        sizes |= {"text_bias": (out,), "image_bias": (image_out,)}
    if paired:
        sizes |= {"x_text": (layout.num_text, width), "x_image": (layout.num_image, image_width)}
    else:
        sizes["x"] = (layout.num_tokens, width)
    return {name: random(*size, seed=i, dtype=dtype) for i, (name, size) in enumerate(sizes.items())}


def make_op(layout):
    def op(backend, text_weight, image_weight, text_bias=None, image_bias=None, x=None, x_text=None, x_image=None):
        rows = (x_text, x_image) if x is None else x
        return routed_linear(rows, text_weight, image_weight, layout, text_bias, image_bias, backend=backend)

    return op


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_reference(name, paired, bias, dtype):
    layout = make_layout(name)
    assert_as_good_as_reference(make_op(layout), make_tensors(layout, dtype, paired, bias))


@needs_native
@pytest.mark.parametrize(
    "frozen",
    [
        ["text_weight", "text_bias"],
        ["text_weight", "image_weight", "text_bias", "image_bias"],
        ["x"],
        ["x", "text_weight", "image_weight"],
        ["x", "image_weight", "text_bias", "image_bias"],
    ],
    ids=str,
)
def test_frozen_tensors_get_no_gradient(frozen):
    layout = make_layout("mixed")
    assert_as_good_as_reference(make_op(layout), make_tensors(layout, torch.float32, False, True), frozen)


@needs_native
def test_keeps_rows_only_for_weight_gradients():
    layout = make_layout("mixed")
    tensors = make_tensors(layout, torch.float32, False, False)
    x = tensors["x"].requires_grad_()
    for trainable, expected in ((False, 2), (True, 3)):
        tensors["image_weight"].requires_grad_(trainable)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            make_op(layout)("native", **tensors)
        assert len(saved) == expected
        assert any(t is x for t in saved) == trainable


class Ops(TorchDispatchMode):
    """The names of the ops that are dispatched, except views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func._opname.startswith(("empty", "new_empty")):
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
def test_runs_one_product_a_tower_and_copies_nothing(paired):
    layout = make_layout("mixed")
    tensors = {name: t.requires_grad_() for name, t in make_tensors(layout, torch.float32, paired, True).items()}
    weights = tensors["text_weight"], tensors["image_weight"]
    x = [tensors["x_text"], tensors["x_image"]] if paired else [tensors["x"]]
    result = make_op(layout)("native", **tensors)
    results = list(result) if paired else [result]
    dy = [torch.randn_like(t) for t in results]
    with Ops() as backward:
        torch.autograd.grad(results, [*x, *weights], dy)
    assert sorted(backward.names) == ["mm", "mm", "routed_linear", "sum", "sum"]
    with torch.no_grad(), Ops() as forward:  # what the op does, which a mode does not see from outside
        linear._forward(x, *weights, None, None, layout.num_text, not paired)
        linear._forward(x, *weights, tensors["text_bias"], tensors["image_bias"], layout.num_text, not paired)
    assert forward.names == ["mm", "mm", "addmm", "addmm"]
    with torch.no_grad(), Ops() as of_rows:
        linear._forward(dy, *(w.t() for w in weights), None, None, layout.num_text, not paired)
    assert of_rows.names == ["mm", "mm"]


@needs_native
def test_rows_and_weights_that_are_not_contiguous():
    layout = make_layout("mixed")
    x, weight = random(37, layout.num_tokens).t(), random(37, 24).t()
    result = routed_linear(x, weight, weight, layout, backend="native")
    torch.testing.assert_close(result, F.linear(x, weight))


@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("joined", [False, True])
def test_schema_fake_and_autograd(paired, joined):
    x = [random(20, 24), random(9, 16)] if paired else [random(29, 24)]
    weights = [random(12, 24), random(12, x[-1].shape[1])]
    bias = random(12, seed=3)
    for tensor in (*x, *weights, bias):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.lmfusion.routed_linear.default, (x, *weights, None, bias, 20, joined))


@needs_native
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
def test_compiles_to_one_graph(paired):
    layout = make_layout("mixed")
    assert_compiles(make_op(layout), make_tensors(layout, torch.float32, paired, bias=True))


def test_reference_gradients():
    layout = make_layout("mixed")
    tensors = make_tensors(layout, torch.float64, False, True, width=3, out=2)
    names = list(tensors)

    def op(*values):
        return make_op(layout)("reference", **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(op, [tensor.requires_grad_() for tensor in tensors.values()])


def test_without_native_ops(monkeypatch):
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "reference")
    layout = make_layout("mixed")
    tensors = make_tensors(layout, torch.float32, False, False)
    result = make_op(layout)(None, **tensors)
    expected = tensors["x"][layout.num_text :] @ tensors["image_weight"].t()
    torch.testing.assert_close(result[layout.num_text :], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_weight": random(24, 36)}, r"text_weight must be \[\*, 37\] .*, got shape \(24, 36\)"),
        ({"image_bias": random(23)}, r"image_bias must be \[24\] .*, got shape \(23,\)"),
        ({"image_weight": random(23, 37), "image_bias": None}, "same number of rows for one result, got 24 and 23"),
        (
            {"text_weight": random(24, 37, dtype=torch.bfloat16)},
            r"text_weight must be in the rows' dtype .*bfloat16",
        ),
        ({"x": random(64, 37).to("meta")}, "x must be on the layout's device cpu, got meta"),
    ],
)
def test_wrong_arguments(change, message):
    layout = make_layout("mixed")
    right = make_tensors(layout, torch.float32, False, True)
    with pytest.raises(ValueError, match=message):
        routed_linear(**right | change, layout=layout)


@needs_native
def test_compiles_once_for_layouts_of_any_size():
    """All row ops in one function: one graph for the first layout, one for every other size."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def op(x, weight, matrix, layout, rope):
        normed = routed_rms_norm(x, weight, weight, layout, 1e-6, backend="native")
        qkv = routed_linear(normed, matrix, matrix, layout, backend="native")
        qkv = routed_swiglu(qkv, matrix, matrix[:, :40], matrix, matrix[:, :40], layout, backend="native")
        return torch.cat([t.flatten() for t in rope_reorder(qkv, layout, rope, 4, backend="native")])

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    for num_text in range(3, 15):
        layout = lk.TokenLayout.from_spans([[("text", num_text), ("image", 4 + num_text // 2), ("text", 1)]])
        arguments = [random(layout.num_tokens, 80), random(80), random(80, 80)]
        rope = lk.rope_tables(layout.position, torch.ones(5))
        for tensor in arguments:
            tensor.requires_grad_()
        results = [run(*arguments, layout, rope) for run in (compiled, op)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(result.sum(), arguments) for result in results))
    assert len(graphs) <= 2

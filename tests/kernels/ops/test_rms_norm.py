"""The routed RMSNorm, forward and backward, for every form of rows and against the native ops' own schema."""

import pytest
import torch
import torch.nn.functional as F

from lmfusion_kernels import reference
from lmfusion_kernels.ops.rms_norm import routed_rms_norm
from tests.kernels.ops.row_ops import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_compiles,
    make_layout,
    needs_native,
    random,
)

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]


def make_tensors(layout, dtype, paired, residual, width=37, image_width=24):
    """Arguments by name, rows with outliers as hidden states have them."""
    image_width = image_width if paired else width
    sizes = {"text_weight": (width,), "image_weight": (image_width,)}
    for name in ("x", "residual") if residual else ("x",):
        if paired:
            sizes |= {f"{name}_text": (layout.num_text, width), f"{name}_image": (layout.num_image, image_width)}
        else:
            sizes[name] = (layout.num_tokens, width)
    tensors = {name: random(*size, seed=i, scale=3.0) for i, (name, size) in enumerate(sizes.items())}
    for tensor in tensors.values():
        tensor[..., 0] *= 20
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def make_op(layout):
    def op(backend, text_weight, image_weight, **rows):
        def rows_of(name):
            return (rows[f"{name}_text"], rows[f"{name}_image"]) if f"{name}_text" in rows else rows.get(name)

        return routed_rms_norm(
            rows_of("x"), text_weight, image_weight, layout, EPS, residual=rows_of("residual"), backend=backend
        )

    return op


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_reference(name, paired, residual, dtype):
    layout = make_layout(name)
    assert_as_good_as_reference(make_op(layout), make_tensors(layout, dtype, paired, residual))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [["text_weight"], ["text_weight", "image_weight"], ["x"]], ids=str)
def test_frozen_tensors_get_no_gradient(frozen, dtype):
    layout = make_layout("mixed")
    assert_as_good_as_reference(make_op(layout), make_tensors(layout, dtype, False, False), frozen)


@needs_native
def test_equals_torch_on_many_wide_rows():
    """Enough rows for several threads and partial sums, with a width that is not a multiple of a vector."""
    layout = make_layout("all image")
    x = random(layout.num_tokens, 1031)
    weight = random(1031, seed=1)
    normed = routed_rms_norm(x, weight, weight, layout, EPS, backend="native")
    torch.testing.assert_close(normed, F.rms_norm(x, (1031,), weight, EPS))


@needs_native
@pytest.mark.parametrize("missing", ["normed", "sum"])
def test_one_of_two_results_unused(missing):
    layout = make_layout("mixed")

    def op(backend, **tensors):
        normed, total = make_op(layout)(backend, **tensors)
        return total if missing == "normed" else normed

    frozen = ["text_weight", "image_weight"] if missing == "normed" else []
    assert_as_good_as_reference(op, make_tensors(layout, torch.float32, False, True), frozen)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradients_do_not_depend_on_threads(dtype):
    x, dy = random(3000, 64, dtype=dtype), random(3000, 64, dtype=dtype, seed=1)
    weight = random(64, dtype=dtype, seed=2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            _, rstd = torch.ops.lmfusion.rms_norm([x], [], weight, weight, 1000, EPS)
            results.append(
                torch.ops.lmfusion.rms_norm_backward([dy], [x], rstd, weight, weight, 1000, [], True, True, False)
            )
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_native
def test_rows_that_are_not_contiguous():
    layout = make_layout("mixed")
    x = random(37, layout.num_tokens).t()
    weight = random(74, seed=1)[::2]
    expected = reference.routed_rms_norm(x, weight, weight, layout, EPS)
    torch.testing.assert_close(routed_rms_norm(x, weight, weight, layout, EPS, backend="native"), expected)


@needs_native
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_schema_fake_and_autograd(paired, residual):
    x, added = ([random(20, 24), random(9, 16)] if paired else [random(29, 24)] for _ in range(2))
    weights = [random(24, seed=1), random(x[-1].shape[1], seed=2)]
    dy = [random(*rows.shape, seed=3) for rows in x]
    for tensor in (*x, *added, *weights):
        tensor.requires_grad_()
    ops = torch.ops.lmfusion
    arguments = (x, added if residual else [], *weights, 20, EPS)
    torch.library.opcheck(ops.rms_norm.default, arguments)
    rstd = ops.rms_norm(*arguments)[-1]
    for tensor in (*x, *added, *weights):
        tensor.requires_grad_(False)
    for wants in ((True, False, True), (False, True, False)):
        backward = (dy, x, rstd, *weights, 20, added if residual else [], *wants)
        torch.library.opcheck(ops.rms_norm_backward.default, backward)


@needs_native
def test_recompute_gives_the_forward_back():
    x, weight = [random(20, 37), random(9, 24)], [random(37, seed=1), random(24, seed=2)]
    *normed, rstd = torch.ops.lmfusion.rms_norm(x, [], *weight, 20, EPS)
    _, _, *again = torch.ops.lmfusion.rms_norm_backward(x, x, rstd, *weight, 20, [], False, False, True)
    assert all(torch.equal(a, b) for a, b in zip(again, normed, strict=True))


@needs_native
@pytest.mark.parametrize("keep", [(True, False), (False, True), (True, True)], ids=["text", "image", "both"])
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("num_constant", [0, 7, 20])
def test_kept_rows_are_copies_without_gradient(num_constant, residual, paired, keep):
    x, added = ([random(20, 24), random(9, 16)] if paired else [random(29, 24)] for _ in range(2))
    weights = [random(24, seed=1), random(x[-1].shape[1], seed=2)]
    for tensor in (*x, *weights):
        tensor.requires_grad_()
    arguments = (x, added if residual else [], *weights, 20, EPS)
    op = torch.ops.lmfusion.rms_norm
    *results, rstd = op(*arguments, num_constant, *keep)
    *plain, plain_rstd = op(*arguments)
    assert torch.equal(rstd, plain_rstd)
    assert all(torch.equal(a, b) for a, b in zip(results[: len(plain)], plain, strict=True))
    normed = plain[len(x) :] if residual else x
    text, image = normed if paired else normed[0].split([20, 9])
    kept = results[len(plain) :]
    expected = [rows for rows, is_kept in zip((text[num_constant:], image), keep, strict=True) if is_kept]
    assert [torch.equal(a, b) for a, b in zip(kept, expected, strict=True)] == [True] * sum(keep)
    assert not any(tensor.requires_grad for tensor in kept)
    own = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel()}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in (*x, *plain)}
    if not num_constant:
        torch.library.opcheck(op.default, (*arguments, 3, *keep))
    inputs = (*x, *weights)
    for grad, target in zip(grads(results[: len(x)], inputs), grads(plain[: len(x)], inputs), strict=True):
        assert torch.equal(grad, target)


def grads(results, inputs):
    return torch.autograd.grad(results, inputs, [random(*t.shape, seed=5) for t in results])


@needs_native
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_compiles_to_one_graph(paired, residual):
    layout = make_layout("mixed")
    assert_compiles(make_op(layout), make_tensors(layout, torch.float32, paired, residual))


@needs_native
@pytest.mark.slow
def test_compiles_with_inductor():
    layout = make_layout("mixed")
    assert_compiles(make_op(layout), make_tensors(layout, torch.float32, False, True), backend="inductor")


def test_reference_gradients():
    layout = make_layout("mixed")
    tensors = make_tensors(layout, torch.float64, True, True, width=3, image_width=2)
    names = list(tensors)
    inputs = [tensor.requires_grad_() for tensor in tensors.values()]

    def op(*values):
        normed, total = make_op(layout)("reference", **dict(zip(names, values, strict=True)))
        return (*normed, *total)

    assert torch.autograd.gradcheck(op, inputs)


def test_without_native_ops(monkeypatch):
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "reference")
    layout = make_layout("mixed")
    tensors = make_tensors(layout, torch.float32, False, False)
    normed = make_op(layout)(None, **tensors)
    x, text_weight, image_weight = tensors["x"], tensors["text_weight"], tensors["image_weight"]
    expected = torch.cat([
        F.rms_norm(x[: layout.num_text], (37,), text_weight, EPS),
        F.rms_norm(x[layout.num_text :], (37,), image_weight, EPS),
    ])  # fmt: skip
    torch.testing.assert_close(normed, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_weight": random(36)}, r"text_weight must be \[37\] .*, got shape \(36,\)"),
        (
            {"image_weight": random(37, dtype=torch.bfloat16)},
            r"image_weight must be in the rows' dtype .*bfloat16",
        ),
        ({"image_weight": random(37).to("meta")}, "image_weight must be on the rows' device cpu, got meta"),
        ({"x": random(63, 37)}, r"x must have 64 rows for this layout, got shape \(63, 37\)"),
        ({"x": random(64, 37, 1)}, r"x must be \[rows, width\], got shape \(64, 37, 1\)"),
        (
            {"x": (random(51, 37), random(13, 37, dtype=torch.bfloat16))},
            r"x must be in the rows' dtype .*bfloat16",
        ),
        ({"x": (random(51, 37), random(12, 37))}, "must have 13 rows for this layout"),
        ({"residual": random(64, 36)}, r"residual must have the shapes of x, \[\(64, 37\)\], got \[\(64, 36\)\]"),
        ({"residual": (random(51, 37), random(13, 37))}, "residual must have the shapes of x"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ],
)
def test_wrong_arguments(change, message):
    layout = make_layout("mixed")
    assert (layout.num_text, layout.num_image) == (51, 13)
    right = {"x": random(64, 37), "text_weight": random(37), "image_weight": random(37)}
    with pytest.raises(ValueError, match=message):
        routed_rms_norm(**right | change, layout=layout, eps=EPS)


@needs_native
@pytest.mark.parametrize("num_constant", [-1, 3])
def test_native_op_checks_num_constant(num_constant):
    weight = random(8)
    with pytest.raises(RuntimeError, match=rf"num_constant must be in \[0, num_text\] = \[0, 2\], got {num_constant}"):
        torch.ops.lmfusion.rms_norm([random(4, 8)], [], weight, weight, 2, EPS, num_constant, True, False)


@needs_native
@pytest.mark.parametrize(
    ("x", "weight", "num_text", "message"),
    [
        (random(4, 8), random(8), 5, "num_text must be in 0 to 4, the rows of the first tensor of x, got 5"),
        (random(4, 8), random(7), 2, r"text_weight must have shape \[8\], got \[7\]"),
        (random(4, 8).double(), random(8).double(), 2, "x must be float32 or bfloat16 .*, got Double"),
        (random(4, 8), random(8).double(), 2, "text_weight must have dtype Float, got Double"),
        (random(4), random(4), 2, r"x must have shape \[rows, width\], got \[4\]"),
    ],
)
def test_native_op_checks_its_arguments(x, weight, num_text, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lmfusion.rms_norm([x], [], weight, weight, num_text, EPS)

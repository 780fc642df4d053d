"""The CUDA RMSNorm is right, forward and backward, for any width, number of rows, alignment and both towers."""

import pytest
import torch

from lmfusion_kernels import reference
from tests.kernels.cuda_emulation.device import make_layout, shifted
from tests.kernels.ops import test_rms_norm as on_cpu
from tests.kernels.ops import test_row_extremes as extremes
from tests.kernels.ops.row_ops import LAYOUTS, assert_as_good_as_reference, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6
ops = torch.ops.lmfusion_emulated


def assert_close(result, expected):
    """Equal up to the rounding of sums in another order."""
    eps = torch.finfo(result.dtype).eps
    torch.testing.assert_close(result, expected.to(result.dtype), rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("width", "image_width"), [(37, 24), (64, 8), (264, 520)])
def test_equals_reference(cuda_ops, width, image_width, name, paired, residual, dtype):
    layout = make_layout(name)
    tensors = on_cpu.make_tensors(layout, dtype, paired, residual, width, image_width)
    assert_as_good_as_reference(on_cpu.make_op(layout), tensors)
    launched = cuda_ops.launched()
    assert len(launched) <= 3  # forward, backward, sums of the weights' gradients
    assert set(launched) <= {
        "rms_norm_kernel", "rms_norm_any_kernel", "rms_norm_backward_kernel", "rms_norm_backward_any_kernel",
        "sum_partials_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 32, 2050, 4096, 8192, 14336, 20000])
def test_widths(cuda_ops, width, dtype):
    """Widths from one element to rows that no block can keep in registers."""
    layout = make_layout("one row") if width > 9000 else make_layout("all text")
    tensors = on_cpu.make_tensors(layout, dtype, False, True, width)
    # The sums of the weights' gradients do the same for every 32 columns.
    frozen = ["text_weight", "image_weight"] if width > 2050 else []
    assert_as_good_as_reference(on_cpu.make_op(layout), tensors, frozen)


@pytest.mark.parametrize("width", [64, 37])
@pytest.mark.parametrize("num_multiprocessors", [1, 3, 132])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_any_number_of_multiprocessors(cuda_ops, rows, num_multiprocessors, width):
    """The number of multiprocessors determines the grid: more rows than threads, and more threads than rows."""
    cuda_ops.set_num_multiprocessors(num_multiprocessors)
    num_text = rows // 3
    x, dy = random(rows, width, dtype=torch.bfloat16), random(rows, width, dtype=torch.bfloat16, seed=1)
    weights = [random(width, dtype=torch.bfloat16, seed=seed) for seed in (2, 3)]
    _, rstd = ops.rms_norm([x], [], *weights, num_text, EPS)
    dx, dtext, dimage = ops.rms_norm_backward([dy], [x], rstd, *weights, num_text, [], True, True, False)
    wide = x.double().requires_grad_(), *(w.double().requires_grad_() for w in weights)
    y = torch.cat(
        [reference.rms_norm(wide[0][:num_text], wide[1], EPS), reference.rms_norm(wide[0][num_text:], wide[2], EPS)]
    )
    exact = torch.autograd.grad(y, wide, dy.double())
    for result, expected in zip((dx, dtext, dimage), exact, strict=True):
        scale = expected.abs().max().item() if expected.numel() else 0
        assert (result.double() - expected).abs().max() <= 2**-8 * scale + 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [37, 64, 520])
def test_weight_gradients_do_not_depend_on_the_order_of_blocks(cuda_ops, width, dtype):
    x, dy = random(150, width, dtype=dtype), random(150, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype, seed=2)
    results = []
    for seed in range(3):
        cuda_ops.seed(seed)
        _, rstd = ops.rms_norm([x], [], weight, weight, 50, EPS)
        results.append(ops.rms_norm_backward([dy], [x], rstd, weight, weight, 50, [dy], True, True, True))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("wants", [(True, False, True), (False, True, False), (False, False, True), (True, True, True)])
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("width", [37, 64])
def test_what_is_wanted_is_what_comes(cuda_ops, width, paired, wants):
    """The gradients do not depend on which other results are requested; y is recomputed."""
    text, image = random(9, width), random(6, 24 if paired else width, seed=1)
    x = [text, image] if paired else [torch.cat([text, image])]
    dy, added = [t.flip(0).clone() for t in x], [2 * t for t in x]
    weights = [random(width, seed=2), random(image.shape[1], seed=3)]
    *y, rstd = ops.rms_norm(x, [], *weights, 9, EPS)
    text_grad, image_grad, recompute = wants
    everything = ops.rms_norm_backward(dy, x, rstd, *weights, 9, added, True, True, True)
    dx, (dtext, dimage), again = everything[: len(x)], everything[len(x) : len(x) + 2], everything[len(x) + 2 :]
    assert all(torch.equal(a, b) for a, b in zip(again, y, strict=True))
    expected = [*dx, *([dtext] if text_grad else []), *([dimage] if image_grad else []), *(y if recompute else [])]
    result = ops.rms_norm_backward(dy, x, rstd, *weights, 9, added, *wants)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    without = ops.rms_norm_backward(dy, x, rstd, *weights, 9, [], *wants)
    for a, b, c in zip(without, dx, added, strict=False):
        assert_close(a, b - c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("width", [37, 64])
@pytest.mark.parametrize("num_constant", [0, 4, 9])
def test_kept_rows(cuda_ops, num_constant, width, paired, residual, dtype):
    text, image = random(9, width, dtype=dtype), random(6, 24 if paired else width, dtype=dtype, seed=1)
    x = [text, image] if paired else [torch.cat([text, image])]
    added = [t.flip(0).clone() for t in x] if residual else []
    weights = [random(width, dtype=dtype, seed=2), random(image.shape[1], dtype=dtype, seed=3)]
    plain = ops.rms_norm(x, added, *weights, 9, EPS)
    normed = plain[len(x) : 2 * len(x)] if residual else x
    rows = list(normed) if paired else [normed[0][:9], normed[0][9:]]
    for keep_text, keep_image in ((True, False), (False, True), (True, True)):
        *results, rstd = ops.rms_norm(x, added, *weights, 9, EPS, num_constant, keep_text, keep_image)
        kept = results[len(x) + len(added) :]
        expected = [rows[0][num_constant:]] if keep_text else []
        expected += [rows[1]] if keep_image else []
        assert [torch.equal(a, b) for a, b in zip(kept, expected, strict=True)] == [True] * len(expected)
        assert all(torch.equal(a, b) for a, b in zip((*results[: len(x) + len(added)], rstd), plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_rows_that_start_anywhere(cuda_ops, offset, dtype):
    def view(rows, seed):
        return random(offset + rows * 64, dtype=dtype, seed=seed)[offset:].view(rows, 64)

    x, dy, added, weight = view(7, 0), view(7, 1), view(7, 2), view(1, 3)[0]
    y, total, rstd = ops.rms_norm([x], [added], weight, weight, 3, EPS)
    again = ops.rms_norm([x.clone()], [added.clone()], weight.clone(), weight.clone(), 3, EPS)
    assert torch.equal(total, again[1])
    assert_close(y, again[0])
    grads = ops.rms_norm_backward([dy], [x], rstd, weight, weight, 3, [added], True, True, True)
    aligned = [t.clone() for t in (dy, x, weight, added)]
    expected = ops.rms_norm_backward(
        [aligned[0]], [aligned[1]], rstd, aligned[2], aligned[2], 3, [aligned[3]], True, True, True
    )
    for result, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=2**-6, atol=2**-6)


NORM_TENSORS = [f"{tower}_{name}" for tower in ("text", "image") for name in ("x", "residual", "weight", "dy", "dsum")]


def forward_and_backward(**t):
    """All results of a pair of towers: of the forward, then of the backward."""
    x, residual, weights, dy, dsum = (
        [t[f"text_{name}"], t[f"image_{name}"]] for name in ("x", "residual", "weight", "dy", "dsum")
    )
    *results, rstd = ops.rms_norm(x, residual, *weights, 5, EPS, 2, True, True)
    return *results, rstd, *ops.rms_norm_backward(dy, x, rstd, *weights, 5, dsum, True, True, True)


@pytest.mark.parametrize("name", NORM_TENSORS)
def test_every_tensor_may_start_anywhere(cuda_ops, name):
    """A single tensor that is not aligned to 16 bytes makes packs of 16 bytes impossible."""
    tensors = {}
    for i, other in enumerate(NORM_TENSORS):
        width = 64 if other.startswith("text") else 24
        shape = (width,) if other.endswith("weight") else (5, width)
        tensors[other] = random(*shape, dtype=torch.bfloat16, seed=i)
    expected = forward_and_backward(**tensors)
    for result, other in zip(forward_and_backward(**tensors | {name: shifted(tensors[name])}), expected, strict=True):
        torch.testing.assert_close(result, other, rtol=2**-6, atol=2**-6)


def test_rows_that_are_not_contiguous(cuda_ops):
    layout = make_layout("mixed")
    x, weight = random(37, layout.num_tokens).t(), random(74, seed=1)[::2]
    y, _ = ops.rms_norm([x], [], weight, weight, layout.num_text, EPS)
    assert_close(y, reference.routed_rms_norm(x, weight, weight, layout, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_copies", "residual"), [(1, False), (9, False), (8, True)])
def test_rows_of_every_kind(cuda_ops, num_copies, residual, dtype):
    extremes.check_rms_norm(dtype, num_copies, residual)

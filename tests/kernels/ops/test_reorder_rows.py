"""Rows of every dtype come out in the given order, and gradients in the inverse order."""

import pytest
import torch

from lmfusion_kernels.ops.reorder_rows import reorder_rows
from tests.kernels.ops.row_ops import needs_native, random

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]


def make_permutation(count, seed=0):
    """index and inverse."""
    index = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return index.int(), torch.argsort(index).int()


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", request.param)


@needs_native
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (70, 37), (5, 2, 3), (1, 4096), (0, 8), (6, 0)], ids=str)
def test_rows_of_any_dtype_and_shape(shape, dtype):
    x = random(*shape, scale=50.0).to(dtype)
    index, inverse = make_permutation(shape[0])
    y = reorder_rows(x, index, inverse)
    assert y.dtype == dtype
    assert torch.equal(y, x[index.long()])
    assert torch.equal(reorder_rows(y, inverse, index), x)


@needs_native
@pytest.mark.usefixtures("backend")
def test_rows_that_are_not_contiguous():
    x = random(37, 9).t()
    index, inverse = make_permutation(9)
    assert torch.equal(reorder_rows(x, index, inverse), x[index.long()])


@needs_native
@pytest.mark.usefixtures("backend")
def test_gradients_of_first_and_second_order():
    x = random(6, 3, dtype=torch.float64).requires_grad_()
    index, inverse = make_permutation(6)
    assert torch.autograd.gradcheck(lambda x: reorder_rows(x, index, inverse), x)
    assert torch.autograd.gradgradcheck(lambda x: reorder_rows(x, index, inverse).square(), x)


@needs_native
def test_schema_fake_and_autograd():
    for x in (random(6, 3).requires_grad_(), random(0, 4), torch.arange(6)):
        torch.library.opcheck(torch.ops.lmfusion.reorder_rows.default, (x, *make_permutation(x.shape[0])))


@needs_native
@pytest.mark.usefixtures("backend")
def test_compiles_to_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(reorder_rows, fullgraph=True, backend="aot_eager")
    for count in (6, 8):
        index, inverse = make_permutation(count)
        x = random(count, 5).requires_grad_()
        y = compiled(x, index, inverse)
        torch.testing.assert_close(y, x[index.long()])
        grad = random(count, 5, seed=1)
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], grad[inverse.long()])


@needs_native
@pytest.mark.parametrize(
    ("x", "index", "inverse", "message"),
    [
        (random(3, 2), [0, 1, 3], [0, 1, 2], r"index must hold indices in \[0, 3\), got"),
        (random(3, 2), [0, 1, -1], [0, 1, 2], r"index must hold indices in \[0, 3\), got"),
        (random(3, 2), [0, 1], [0, 1, 2], r"index must have shape \[3\], got \[2\]"),
        (random(3, 2), [0, 1, 2], [0, 1], r"inverse must have shape \[3\], got \[2\]"),
        (torch.tensor(1.0), [0], [0], r"x must have shape \[N, ...\], got a scalar"),
    ],
)
def test_native_op_checks_its_arguments(x, index, inverse, message):
    vectors = (torch.tensor(values, dtype=torch.int32) for values in (index, inverse))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lmfusion.reorder_rows(x, *vectors)


@needs_native
def test_native_op_takes_int32_indices():
    with pytest.raises(RuntimeError, match="index must have dtype Int, got Long"):
        torch.ops.lmfusion.reorder_rows(random(3, 2), torch.arange(3), torch.arange(3).int())

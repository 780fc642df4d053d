"""The CUDA reorder moves every row of any dtype and size to its place, there and back."""

import pytest
import torch

from lmfusion_kernels.ops.reorder_rows import reorder_rows
from tests.kernels.cuda_emulation.device import make_layout
from tests.kernels.ops.row_ops import LAYOUTS, assert_as_good_as_reference, random

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool]
ops = torch.ops.lmfusion_emulated


def permutation(size):
    index = torch.randperm(size, generator=torch.Generator().manual_seed(size)).int()
    return index, index.argsort().int()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (1, 1), (7, 3), (7, 4), (9, 2, 8), (70, 24), (3, 4097)], ids=str)
def test_every_row_arrives(cuda_ops, shape, dtype):
    x = (100 * random(*shape)).to(dtype)
    index, inverse = permutation(shape[0])
    y = ops.reorder_rows(x, index, inverse)
    assert torch.equal(y, x[index.long()])
    assert torch.equal(ops.reorder_rows(y, inverse, index), x)
    assert cuda_ops.launched() == ["reorder_rows_kernel"] * (2 if x.numel() else 0)


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_rows_that_start_anywhere(cuda_ops, offset):
    x = random(offset + 6 * 32, dtype=torch.bfloat16)[offset:].view(6, 32)
    index, inverse = permutation(6)
    assert torch.equal(ops.reorder_rows(x, index, inverse), x[index.long()])


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient(cuda_ops, name):
    layout = make_layout(name)
    order = layout.tower_to_sequence, layout.sequence_to_tower

    def op(backend, x):
        return reorder_rows(x, *order) if backend == "native" else x.index_select(0, order[0])

    assert_as_good_as_reference(op, {"x": random(layout.num_tokens, 20)})
    assert cuda_ops.launched() == ["reorder_rows_kernel"] * (2 if layout.num_tokens else 0)


def test_rows_of_every_length_in_any_order_of_blocks(cuda_ops):
    x = random(300, 40)
    index, inverse = permutation(300)
    for seed in range(3):
        cuda_ops.seed(seed)
        assert torch.equal(ops.reorder_rows(x, index, inverse), x[index.long()])

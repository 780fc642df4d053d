"""Reordering of rows from tower order to sequence order, beside index_select and indexing."""

import pytest
import torch

import lmfusion_kernels as lk
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row

ROWS, WIDTH = shapes.ROW_OP_TOKENS, shapes.MAIN.hidden_size


@pytest.mark.parametrize(("direction", "dtype"), shapes.by_dtype(zip(shapes.DIRECTIONS), lambda way: way != "forward"))
def test_reorder_rows(record, device, direction, dtype):
    layout = lk.TokenLayout.from_spans([[("text", 256), ("image", 256)]] * (ROWS // 512), device=device)
    index, backward = layout.sequence_to_tower.long(), direction != "forward"

    def contestant(reorder):
        def prepare(seed):
            torch.manual_seed(seed)
            x = torch.randn(ROWS, WIDTH, device=device).to(dtype).requires_grad_(backward)
            dy = torch.randn_like(x)

            def call():
                y = reorder(x)
                return (y, *torch.autograd.grad(y, x, dy)) if backward else y

            return call

        return Contestant(prepare)

    contestants = {
        "ours": contestant(layout.to_sequence_order),
        "index_select": contestant(lambda x: x.index_select(0, index)),
        "x[index]": contestant(lambda x: x[index]),
    }
    num_bytes = (4 if backward else 2) * ROWS * WIDTH * dtype.itemsize
    row = Row(
        "reorder_rows", "", dtype, direction, shapes.MAIN.name, ROWS, num_bytes=num_bytes, least=shapes.MEMORY_BOUND
    )
    record(row, contestants)

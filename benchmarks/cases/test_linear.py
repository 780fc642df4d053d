"""The routed projections, beside grouped_mm on stacked weights and one product of all rows.

We run two cuBLAS calls on the slices. One product of all rows with one weight is the floor of "no routing".
"""

import pytest
import torch
import torch.nn.functional as F

import lmfusion_kernels as lk
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row, UnavailableError

SHAPE = shapes.MAIN
PROJECTIONS = {
    "qkv": (SHAPE.hidden_size, SHAPE.qkv_width),
    "gate and up": (SHAPE.hidden_size, 2 * SHAPE.intermediate_size),
    "down": (SHAPE.intermediate_size, SHAPE.hidden_size),
}
CASES = [(direction, projection, 50) for direction in shapes.DIRECTIONS for projection in PROJECTIONS]
CASES += [("forward", "gate and up", percent) for percent in shapes.TEXT_SHARES if percent != 50]


def grouped_mm(weights, ends):
    """torch's grouped GEMM with two groups. It needs stacked weights; the copy is made once and not timed."""
    if not hasattr(F, "grouped_mm"):
        raise UnavailableError("torch.nn.functional.grouped_mm needs torch 2.10 or later")
    stacked = torch.stack([weight.detach().t().contiguous() for weight in weights]).requires_grad_()
    return stacked, lambda x: F.grouped_mm(x, stacked, offs=ends)


@pytest.mark.parametrize(("direction", "projection", "percent", "dtype"), shapes.by_dtype(CASES, lambda *_: False))
def test_linear(record, device, direction, projection, percent, dtype):
    wide_in, wide_out = PROJECTIONS[projection]
    tokens, backward = shapes.NUM_TOKENS, direction != "forward"
    layout = lk.TokenLayout.from_spans(shapes.share_of_text(tokens, percent), frozen_text=False, device=device)
    torch.manual_seed(0)
    weights = [
        (torch.randn(wide_out, wide_in, device=device) * wide_in**-0.5).to(dtype).requires_grad_() for _ in range(2)
    ]
    ends = torch.tensor([layout.num_text, tokens], dtype=torch.int32, device=device)

    def contestant(make, **options):
        """make() returns the weights it takes gradients of and the product."""

        def prepare(seed):
            leaves, product = make()
            torch.manual_seed(seed)
            x = torch.randn(tokens, wide_in, device=device).to(dtype).requires_grad_(backward)
            dy = torch.randn(tokens, wide_out, device=device).to(dtype)

            def call():
                if not backward:
                    with torch.no_grad():
                        return product(x)
                y = product(x)
                return y, *torch.autograd.grad(y, [x, *leaves], dy)

            return call

        # y and dx: gradients of weights come in different forms
        results = (lambda returned: returned[:2]) if backward else (lambda returned: [returned])
        return Contestant(prepare, results, **options)

    def make_grouped():
        stacked, product = grouped_mm(weights, ends)
        return [stacked], product

    contestants = {
        "ours": contestant(lambda: (weights, lambda x: lk.routed_linear(x, *weights, layout))),
        "grouped_mm, stacked weights": contestant(make_grouped),
        "one product, one weight (floor)": contestant(
            lambda: (weights[:1], lambda x: F.linear(x, weights[0])), is_floor=True
        ),
    }
    flops = 2.0 * tokens * wide_in * wide_out * (3 if backward else 1)
    row = Row("routed_linear", f"{projection}, {percent} % text", dtype, direction, SHAPE.name, tokens, flops=flops,
              set_bytes=tokens * (wide_in + wide_out) * dtype.itemsize)  # fmt: skip
    record(row, contestants)

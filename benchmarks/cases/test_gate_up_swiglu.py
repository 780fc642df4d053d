"""The routed feed-forward network: two calls and a pass, SwiGLU in an epilogue, and compiled PyTorch."""

import contextlib
import os

import pytest
import torch
import torch.nn.functional as F

import lmfusion_kernels as lk
from benchmarks.baselines.slabs import pointwise
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row, unavailable_if_refused

SHAPE, TOKENS = shapes.MAIN, shapes.NUM_TOKENS


@contextlib.contextmanager
def ffn(kind):
    """Set LMFUSION_KERNELS_FFN temporarily."""
    before = os.environ.get("LMFUSION_KERNELS_FFN")
    os.environ["LMFUSION_KERNELS_FFN"] = kind
    try:
        yield
    finally:
        os.environ.pop("LMFUSION_KERNELS_FFN")
        if before is not None:
            os.environ["LMFUSION_KERNELS_FFN"] = before


@pytest.mark.parametrize("dtype", shapes.DTYPES[-1:], ids=shapes.dtype_id)
def test_routed_swiglu(record, device, dtype):
    """Only the forward, where an epilogue could save most."""
    layout = lk.TokenLayout.from_spans(shapes.share_of_text(TOKENS, 50), device=device)
    torch.manual_seed(0)
    d, intermediate = SHAPE.hidden_size, SHAPE.intermediate_size
    sizes = [(2 * intermediate, d), (d, intermediate)] * 2  # gate and up, down; of text, of image
    weights = [(torch.randn(*size, device=device) * size[1] ** -0.5).to(dtype) for size in sizes]

    def contestant(network, **options):
        def prepare(seed):
            torch.manual_seed(seed)
            x = torch.randn(TOKENS, d, device=device).to(dtype)
            with unavailable_if_refused():
                network(x)
            return lambda: network(x)

        return Contestant(prepare, **options)

    def ours(kind):
        def network(x):
            with ffn(kind):
                return lk.routed_swiglu(x, *weights, layout)

        return network

    def by_tower(x):
        activate = pointwise(True).swiglu
        rows = x.split([layout.num_text, layout.num_image])
        towers = ((rows[0], *weights[:2]), (rows[1], *weights[2:]))
        return torch.cat([F.linear(activate(F.linear(r, gate_up)), down) for r, gate_up, down in towers])

    contestants = {"ours": contestant(ours("two-calls")), "slabs, compiled": contestant(by_tower, is_compiled=True)}
    if device.type == "cuda":
        contestants |= {f"ours, FFN={kind}": contestant(ours(kind)) for kind in ("triton", "quack")}
    row = Row("routed_swiglu", "50 % text", dtype, "forward", SHAPE.name, TOKENS,
              flops=6.0 * TOKENS * d * intermediate, set_bytes=2 * TOKENS * d * dtype.itemsize)  # fmt: skip
    record(row, contestants)

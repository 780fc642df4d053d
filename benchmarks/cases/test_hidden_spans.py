"""Attention with hidden spans (BAGEL's noised copies of images): each kernel that supports them, and torch's attention.

torch's attention gets a dense mask. Rates count the visible pairs. The layout and the dense mask are built before the
clock starts.
"""

import pytest
import torch

import lmfusion_kernels as lk
from benchmarks.baselines.sdpa import expanded, folded, sdpa
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row, unavailable_if_refused

SHAPE = shapes.MAIN
TOKENS = 8192 if shapes.HAS_GPU else 1024
KERNELS = ("triton", "flash", "flash-attn-2", "flash-attn-3", "flex") if shapes.HAS_GPU else ("reference",)
SDPA = ("cudnn", "efficient") if shapes.HAS_GPU else ("flash", "math")


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=shapes.dtype_id)
@pytest.mark.parametrize("direction", shapes.DIRECTIONS)
def test_hidden_spans(record, device, direction, dtype):
    heads, kv_heads, head_dim = SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.head_dim
    documents, backward = shapes.noised_copies(TOKENS), direction != "forward"

    def build_layout():
        return lk.TokenLayout.from_spans(documents, frozen_text=False, device=device)

    layout = build_layout()

    def contestant(attend, counts, results=None, **options):
        """attend(q, k, v); counts: the heads that it takes of q, k, v and the gradient of the output."""

        def prepare(seed):
            torch.manual_seed(seed)
            drawn = [
                torch.randn(layout.num_tokens, n, head_dim, device=device).to(dtype)
                for n in (heads, kv_heads, kv_heads, heads)
            ]
            *leaves, dout = [x if n is None else expanded(x, n) for x, n in zip(drawn, counts, strict=True)]
            leaves = [x.requires_grad_(backward) for x in leaves]
            with unavailable_if_refused(), torch.no_grad():
                attend(*leaves)

            def call():
                with torch.set_grad_enabled(backward):
                    out = attend(*leaves)
                return (out, *torch.autograd.grad(out, leaves, dout)) if backward else out

            return call

        return Contestant(prepare, **({} if results is None else {"results": results}), **options)

    def native(backend=None, **options):
        def attend(q, k, v):
            return lk.hybrid_attention(q, k, v, layout, backend=backend)

        return contestant(attend, [None] * 4, mask=build_layout, **options)

    def results(returned):
        parts = returned if backward else [returned]
        return [folded(x, n) for x, n in zip(parts, (heads, heads, kv_heads, kv_heads), strict=False)]

    contestants = {"ours": native()}
    contestants |= {name: native(name, is_compiled=name == "flex") for name in KERNELS}
    for backend in SDPA:
        mask = sdpa(backend, "mask", documents, layout)
        contestants[f"sdpa {backend}, mask"] = contestant(
            mask, [heads] * 4, results, mask=lambda: lk.reference.hybrid_mask(layout)
        )
    pairs = int((layout.mask.query_end.long() - layout.mask.query_start.long()).sum())
    row = Row("hidden_spans", "noised copies", dtype, direction, SHAPE.name, layout.num_tokens,
              flops=(14.0 if backward else 4.0) * pairs * heads * head_dim)  # fmt: skip
    record(row, contestants)

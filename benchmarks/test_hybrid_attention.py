"""What does hybrid attention cost, forward and backward, beside torch's scaled_dot_product_attention as people use it?

The baselines get keys and values expanded to all heads, their masks and their layout [1, H, N, D] for nothing: only
attention is timed. GFLOP/s are those of the visible area.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lmfusion_kernels as lk
from benchmarks.compare import record
from lmfusion_kernels import reference
from lmfusion_kernels.hybrid_attention import hybrid_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
DTYPES = [torch.float32, torch.bfloat16]
BATCHES = {
    "causal": ([[("text", 1024)]], {"causal": 1.0}),
    "text and image": ([[("text", 512), ("image", 512)]], {"dense mask": 1.0}),
    "16 documents": ([[("text", 34), ("image", 64), ("text", 30)]] * 16, {"dense mask": 0.3, "loop, dense masks": 1.0}),
}


def attend_causally(q, k, v, layout):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def make_dense(layout):
    mask = reference.hybrid_mask(layout)
    return lambda q, k, v, layout: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def make_loop(layout):
    """One call a document, each with the mask of that document alone."""
    starts = [*layout.key_start.unique().tolist(), layout.num_tokens]
    mask = reference.hybrid_mask(layout)
    documents = [(slice(a, b), mask[a:b, a:b].contiguous()) for a, b in itertools.pairwise(starts)]

    def attend(q, k, v, layout):
        return torch.cat(
            [
                F.scaled_dot_product_attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], attn_mask=mask)
                for rows, mask in documents
            ],
            dim=2,
        )

    return attend


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", BATCHES)
def test_hybrid_attention(benchmark, name, dtype):
    torch.manual_seed(0)
    documents, bars = BATCHES[name]
    layout = lk.TokenLayout.from_spans(documents)
    rows = layout.num_tokens
    sizes = [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS]
    leaves = [torch.randn(rows, heads, HEAD_DIM, dtype=dtype).requires_grad_() for heads in sizes]
    dout = torch.randn(rows, NUM_HEADS, HEAD_DIM, dtype=dtype)

    def ours():
        out = hybrid_attention(*leaves, layout, backend="native")
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    def expand(x):  # [rows, heads, D] -> [1, all heads, rows, D]
        return x.detach().repeat_interleave(NUM_HEADS // x.shape[1], dim=1).transpose(0, 1)[None].contiguous()

    expanded = [expand(x).requires_grad_() for x in leaves]
    dout_expanded = expand(dout)

    def baseline(attend):
        def call():
            out = attend(*expanded, layout)
            return out.detach(), *torch.autograd.grad(out, expanded, dout_expanded)

        return call

    makers = {"causal": lambda _: attend_causally, "dense mask": make_dense, "loop, dense masks": make_loop}
    contestants = {"ours": ours} | {bar: baseline(makers[bar](layout)) for bar in bars}
    results = ours()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for bar in bars:
        for result, target in zip(results, contestants[bar](), strict=True):
            # gradients of the copies of a key-value head add up
            folded = target[0].transpose(0, 1).unflatten(1, (result.shape[1], -1)).sum(2)
            torch.testing.assert_close(result, folded, rtol=tolerance, atol=tolerance * folded.abs().max().item())
    area = int(reference.hybrid_mask(layout).sum())
    record(benchmark, contestants, "ours", bars, flops=14 * area * NUM_HEADS * HEAD_DIM, rounds=11)

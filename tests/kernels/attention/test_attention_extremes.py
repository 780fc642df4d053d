"""Attention on the CPU with scores that are huge, overflow or are not numbers, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from lmfusion_kernels.ops.hybrid_attention import hybrid_attention
from tests.kernels.ops.row_ops import needs_native

pytestmark = needs_native

DTYPES = [torch.float32, torch.bfloat16]
INF, NAN = math.inf, math.nan
LARGEST = torch.finfo(torch.float32).max

# Of two queries and two keys: what element 0 of each holds (the others are 0), and the scale. All values are the same
# in bfloat16 or differ from it by a rounding that both sides make.
TWO_BY_TWO = {
    "beyond 2^32": ([1, 1], [5e9, 4.5e9], 1.0),
    "two that are equal": ([1, 1], [5e9, 5e9], 1.0),
    "far below zero": ([1, 1], [-5e9, -4.5e9], 1.0),
    "both ends": ([1, -1], [3e38, -3e38], 1.0),
    "difference overflows": ([1, -1], [LARGEST, -LARGEST], 1.0),
    "negative scale": ([1, -1], [5e9, -5e9], -1.0),
    "large scale": ([1, 2], [2, 1], 1e30),
    "large negative scale": ([1, 2], [2, 1], -1e30),
    "scale times query overflows": ([1e10, 1], [1e-8, -1e-8], 1e30),
    "scale times key overflows": ([1e-8, 1e-8], [1e10, -1e10], 1e30),
    "scale times score overflows": ([1, 1], [2, 1], 3e38),
    "scale overflows": ([1, 1], [2, 1], 1e39),
    "scale 0": ([1, 1], [3e38, -3e38], 0.0),
    "scale nan": ([1, 1], [2, 1], NAN),
    "one score inf": ([1e30, 1], [1e30, 1], 1.0),
    "all scores inf": ([1e30, 1], [1e30, 1e30], 1.0),
    "one score -inf": ([1e30, 1], [-1e30, 1], 1.0),
    "all scores -inf": ([1e30, 1], [-1e30, -1e30], 1.0),
    "key inf": ([1, -1], [INF, 1], 1.0),
    "key -inf": ([1, -1], [-INF, 1], 1.0),
    "query inf": ([INF, 1], [1, 2], 1.0),
    "key nan": ([1, 1], [NAN, 1], 1.0),
    "query nan": ([1, NAN], [1, 2], 1.0),
}


def grads_of(op, inputs, dout):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def two_by_two(q, k, dtype, head_dim):
    rows = torch.zeros(2, 2, 1, head_dim)
    rows[:, :, 0, 0] = torch.tensor([q, k])
    values = torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 1, head_dim)
    return [x.to(dtype) for x in (*rows, values)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TWO_BY_TWO)
def test_equals_torch(name, dtype):
    """torch's plain formula with float32 scores. NaN where torch has NaN, and nowhere else."""
    q, k, scale = TWO_BY_TWO[name]
    layout = lk.TokenLayout.from_spans([[("image", 2)]])
    inputs = two_by_two(q, k, dtype, 8)
    dout = torch.ones_like(inputs[0])

    def plain(q, k, v):
        return reference.hybrid_attention(q, k, v, layout, scale)

    native = grads_of(lambda *x: hybrid_attention(*x, layout, scale, backend="native"), inputs, dout)
    expected = grads_of(plain, inputs, dout)
    # The backward takes `out` as it was stored: in bfloat16 rounded, which shows in gradients of scores.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.0}
    for what, result, target in zip(("out", "dq", "dk", "dv"), native, expected, strict=True):
        torch.testing.assert_close(
            result, target, **tolerance, equal_nan=True, msg=lambda text, what=what: f"{what}: {text}"
        )
    # torch's own kernel spreads the scale differently over q and k, and gives NaN or 0 for a query of NaN.
    if "scale" not in name and "nan" not in name:
        heads = [x.float().transpose(0, 1)[None] for x in inputs]
        own = F.scaled_dot_product_attention(*heads, scale=scale)[0].transpose(0, 1)
        torch.testing.assert_close(native[0], own.to(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_known_values(dtype):
    layout = lk.TokenLayout.from_spans([[("image", 2)]])
    inputs = two_by_two([1, 1], [5e9, 4.5e9], dtype, 8)
    out, dq, dk, dv = grads_of(lambda *x: hybrid_attention(*x, layout, 1.0), inputs, torch.ones_like(inputs[0]))
    assert out.eq(1).all() and dq.eq(0).all() and dk.eq(0).all()
    assert dv[0].eq(2).all() and dv[1].eq(0).all()


def one_hot_inputs(layout, heads, kv_heads, head_dim, offset, step, dtype):
    """q picks one element of each key, so all scores are exact: `offset` and some small multiple of `step`."""
    generator = torch.Generator().manual_seed(0)
    n = layout.num_tokens
    picked = torch.randint(head_dim, (n, heads), generator=generator)
    q = F.one_hot(picked, head_dim).float()
    k = offset + step * torch.randint(-3, 4, (n, kv_heads, head_dim), generator=generator)
    v, dout = (torch.randn(n, count, head_dim, generator=generator) for count in (kv_heads, heads))
    return [x.to(dtype) for x in (q, k, v)], dout.to(dtype)


LAYOUTS = {
    "mixed": [[("text", 70), ("image", 90), ("text", 30)], [("image", 5), ("text", 1)], [("text", 3), ("marker", 1)]],
    "hidden": [
        [("text", 20), ("image", 70, "hidden"), ("image", 64), ("text", 30)],
        [("image", 9, "hidden"), ("text", 9)],
    ],
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [9, 12, 20, 24, 33, 66, 100, 126])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 8), (6, 2, 64), (3, 1, 80), (2, 1, 128)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_small_differences_between_huge_scores(name, heads, kv_heads, head_dim, exponent, sign):
    """Scores of 2^20 that differ by eighths have the softmax of the differences: the sum of weights must survive."""
    layout = lk.TokenLayout.from_spans(LAYOUTS[name], frozen_text=False)
    step = max(0.125, 2.0 ** (exponent - 22))
    inputs, dout = one_hot_inputs(layout, heads, kv_heads, head_dim, sign * 2.0**exponent, step, torch.float32)
    native = grads_of(lambda *x: hybrid_attention(*x, layout, 1.0, backend="native"), inputs, dout)
    exact = grads_of(
        lambda *x: reference.hybrid_attention(*x, layout, 1.0), [x.double() for x in inputs], dout.double()
    )
    for what, result, target in zip(("out", "dq", "dk", "dv"), native, exact, strict=True):
        # Gradients of scores sum to 0 over a row, so dq is what rounding leaves of a sum of huge numbers. Near the end
        # of float32 that sum overflows, in plain PyTorch too.
        if what == "dq" and exponent > 100:
            continue
        tolerance = 3e-5 * (2.0**exponent if what == "dq" else 1.0)
        torch.testing.assert_close(
            result.double(), target, rtol=3e-5, atol=tolerance, msg=lambda text, what=what: f"{what}: {text}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_magnitudes_that_change_from_tile_to_tile(name, dtype):
    """A few keys in each tile of 64 are larger than all before them, smaller, or far below zero."""
    layout = lk.TokenLayout.from_spans(LAYOUTS[name], frozen_text=False)
    n = layout.num_tokens
    generator = torch.Generator().manual_seed(1)
    q = F.one_hot(torch.zeros(n, 2, dtype=torch.long), 16).float()
    k = torch.randn(n, 1, 16, generator=generator)
    exponent = torch.randint(-20, 126, (n,), generator=generator).float()
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    k[:, 0, 0] = torch.where(torch.rand(n, generator=generator) < 0.3, sign * 2**exponent, k[:, 0, 0])
    v, dout = (torch.randn(n, count, 16, generator=generator).to(dtype) for count in (1, 2))
    inputs = [q.to(dtype), k.to(dtype), v]
    native = grads_of(lambda *x: hybrid_attention(*x, layout, 1.0, backend="native"), inputs, dout)
    exact = grads_of(
        lambda *x: reference.hybrid_attention(*x, layout, 1.0), [x.double() for x in inputs], dout.double()
    )
    unit = torch.finfo(dtype).eps
    for what, result, target in zip(("out", "dk", "dv"), (native[0], *native[2:]), (exact[0], *exact[2:]), strict=True):
        torch.testing.assert_close(
            result.double(),
            target,
            rtol=4 * unit,
            atol=max(16 * unit, 3e-5),
            msg=lambda text, what=what: f"{what}: {text}",
        )
    assert native[1].isfinite().all()


@pytest.mark.parametrize("num_queries", [1, 3, 17])
def test_decode_with_huge_scores(num_queries):
    layout = lk.TokenLayout.from_spans(
        [[("text", num_queries)]] * 2, cached_lengths=[130, 9], cache_starts=[0, 200], cache_slots=300
    )
    generator = torch.Generator().manual_seed(2)
    q = F.one_hot(torch.randint(64, (2 * num_queries, 6), generator=generator), 64).float()
    k = 5e9 * torch.rand(300, 2, 64, generator=generator).bernoulli(0.5) - 5e8
    v = torch.randn(300, 2, 64, generator=generator)
    with torch.no_grad():
        out = hybrid_attention(q, k, v, layout, 1.0, backend="native")
    torch.testing.assert_close(out, reference.hybrid_attention(q, k, v, layout, 1.0))


def test_log_sum_exp_of_huge_scores():
    layout = lk.TokenLayout.from_spans(LAYOUTS["mixed"])
    (q, k, v), _ = one_hot_inputs(layout, 2, 1, 16, 2.0**20, 0.125, torch.float32)
    _, lse = torch.ops.lmfusion.hybrid_attention(q, k, v, layout.key_start, layout.key_end, None, 1.0)
    scores = torch.einsum("nhd,md->hnm", q.double(), k[:, 0].double())
    expected = scores.masked_fill(~reference.hybrid_mask(layout), -INF).logsumexp(-1)
    assert torch.equal(lse, expected.float())


@pytest.mark.parametrize("payload", [0x7FC00001, 0x7F800001, 0xFFC000FF, 0x7FFFFFFF])
def test_every_nan_stays_nan(payload):
    layout = lk.TokenLayout.from_spans([[("image", 2)]])
    q, k, v = two_by_two([1, 1], [1, 1], torch.float32, 8)
    k.view(torch.int32)[0, 0, 0] = payload - (1 << 32 if payload >> 31 else 0)
    assert hybrid_attention(q, k, v, layout, 1.0, backend="native").isnan().all()

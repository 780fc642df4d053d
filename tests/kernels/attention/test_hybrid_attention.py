"""Hybrid attention, forward and backward, for every mask; it costs what is visible and no more."""

import resource
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from lmfusion_kernels.ops.hybrid_attention import hybrid_attention, ranges_by_key
from tests.kernels.ops.row_ops import needs_native

pytestmark = needs_native
_ops = torch.ops.lmfusion

DTYPES = [torch.float32, torch.bfloat16]
HEADS = [(2, 2), (3, 1), (4, 1), (6, 2)]
MIXED = [[("text", 70), ("image", 90), ("text", 30)], [("image", 5), ("text", 1)], [("text", 3), ("marker", 1)]]

spans = st.tuples(st.sampled_from(["text", "image", "marker"]), st.one_of(st.integers(1, 9), st.integers(10, 150)))
documents = st.lists(st.lists(spans, min_size=1, max_size=4), min_size=1, max_size=6)


def make_inputs(num_queries, num_keys, num_heads, num_kv_heads, head_dim, dtype=torch.float32, seed=0):
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(num_queries, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads), (num_queries, num_heads)]
    return [torch.randn(*size, head_dim, generator=generator).to(dtype) for size in sizes]


def run(op, q, k, v, dout, dtype):
    """The output and the gradients of q, k, v in float64, computed by `op` in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = op(*leaves)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, dout.to(dtype)))]


def assert_as_good_as_reference(layout, num_heads, num_kv_heads, head_dim, dtype, scale=None, seed=0):
    """Errors against the float64 reference, as root mean squares: at most twice those of the reference in `dtype`.

    Gradients of scores are differences, dout . (v - out), that may cancel to nothing where few keys are seen. The floor
    is what rounding, also that of `out` to `dtype`, leaves of them for inputs of about 1.
    """
    inputs = make_inputs(layout.num_tokens, layout.num_tokens, num_heads, num_kv_heads, head_dim, dtype, seed)
    exact = run(lambda *x: reference.hybrid_attention(*x, layout, scale), *inputs, torch.float64)
    plain = run(lambda *x: reference.hybrid_attention(*x, layout, scale), *inputs, dtype)
    native = run(lambda *x: hybrid_attention(*x, layout, scale, backend="native"), *inputs, dtype)
    floor = 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 4 * exact[0].square().mean().sqrt()
    for name, target, same_dtype, result in zip(("out", "dq", "dk", "dv"), exact, plain, native, strict=True):
        error, allowed = (result - target).square().mean().sqrt(), 2 * (same_dtype - target).square().mean().sqrt()
        assert error <= allowed + floor, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_equals_reference(num_heads, num_kv_heads, head_dim, dtype):
    assert_as_good_as_reference(lk.TokenLayout.from_spans(MIXED), num_heads, num_kv_heads, head_dim, dtype)


@settings(max_examples=60)
@given(documents, st.sampled_from(HEADS), st.sampled_from([16, 40, 64]), st.sampled_from(DTYPES), st.integers(0, 99))
def test_equals_reference_on_random_documents(documents, heads, head_dim, dtype, seed):
    # The backward uses `out` as it was stored; in bfloat16 that shows where all queries see just two or three keys.
    documents = [*documents, [("text", 60)]] if dtype == torch.bfloat16 else documents
    assert_as_good_as_reference(lk.TokenLayout.from_spans(documents), *heads, head_dim, dtype, seed=seed)


@pytest.mark.parametrize("scale", [1.0, -0.3, 3.0])
def test_scale(scale):
    assert_as_good_as_reference(lk.TokenLayout.from_spans(MIXED), 2, 1, 16, torch.float32, scale=scale)


def test_strided_inputs():
    """Views of one qkv buffer, as a fused projection gives them, and an expanded gradient, as `out.sum()` gives it."""
    layout = lk.TokenLayout.from_spans(MIXED)
    qkv = torch.randn(layout.num_tokens, 4, 16, requires_grad=True)
    grads = []
    for op in (reference.hybrid_attention, hybrid_attention):
        out = op(*qkv.split([2, 1, 1], dim=1), layout)
        grads.append(torch.autograd.grad(out.sum(), qkv)[0])
    torch.testing.assert_close(*grads)


def test_visibility():
    """An image token sees its whole image and everything before it, never later text; later text sees the whole image;
    documents do not see each other. Shown by changing one token at a time."""
    layout = lk.TokenLayout.from_spans([[("text", 3), ("image", 4), ("text", 3)], [("text", 2), ("image", 3)]])
    words_before, picture, words_after = range(3), range(3, 7), range(7, 10)
    second_document = range(10, 15)
    q, k, v, _ = make_inputs(15, 15, 2, 1, 16)
    out = hybrid_attention(q, k, v, layout)

    def changed_by(token):
        other_k, other_v = k.clone(), v.clone()
        other_k[token] += 1.0
        other_v[token] += 1.0
        difference = (hybrid_attention(q, other_k, other_v, layout) != out).flatten(1).any(dim=1)
        return set(difference.nonzero().flatten().tolist())

    for token in words_before:
        assert changed_by(token) == {*range(token, 10)}  # its later words, the picture, the words after it
    for token in picture:
        assert changed_by(token) == {*picture, *words_after}  # also the patches before it
    for token in words_after:
        assert changed_by(token) == {*range(token, 10)}  # no patch
    for token in second_document:
        assert changed_by(token) <= {*second_document}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_active_rows_alone(dtype):
    """A backward over the active tokens gives their slice of the full backward."""
    layout = lk.TokenLayout.from_spans(MIXED)
    assert 0 < layout.num_constant < layout.num_text
    n, scale = layout.num_tokens, 0.25
    q, k, v, dout = make_inputs(n, n, 6, 2, 16, dtype)
    active = layout.active.key.long()
    dout[[i for i in range(n) if i not in set(active.tolist())]] = 0  # constant rows have no gradient to pass on
    full = run(lambda *x: hybrid_attention(*x, layout, scale), q, k, v, dout, dtype)

    active_ranges = layout.active.key_start, layout.active.key_end
    out, lse = _ops.hybrid_attention(q[active], k, v, *active_ranges, layout.active.out_row, scale)
    row = layout.active.out_row.long()
    torch.testing.assert_close(out[row].double(), full[0][active])
    dout_tower = torch.empty_like(out)
    dout_tower[row] = dout[active]
    query_ranges = layout.active.query_start, layout.active.query_end
    grads = _ops.hybrid_attention_backward(
        dout_tower,
        q[active],
        k,
        v,
        out,
        lse,
        *active_ranges,
        layout.active.key,
        *query_ranges,
        layout.active.out_row,
        scale,
    )
    for name, grad, expected in zip(("dq", "dk", "dv"), grads, full[1:], strict=True):
        torch.testing.assert_close(
            grad.double(), expected[active], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5, msg=name
        )


def test_only_listed_keys_get_gradients():
    layout = lk.TokenLayout.from_spans(MIXED)
    n = layout.num_tokens
    q, k, v, dout = make_inputs(n, n, 2, 1, 16)
    ranges = layout.key_start, layout.key_end
    out, lse = _ops.hybrid_attention(q, k, v, *ranges, None, 1.0)
    every = torch.arange(n, dtype=torch.int32)
    full = _ops.hybrid_attention_backward(
        dout, q, k, v, out, lse, *ranges, every, layout.mask.query_start, layout.mask.query_end, None, 1.0
    )
    for listed in (every[::2], every[5:9], every[-1:], torch.cat([every[3:70], every[90:91], every[130:]]), every[:0]):
        by_key = layout.mask.query_start[listed], layout.mask.query_end[listed]
        some = _ops.hybrid_attention_backward(dout, q, k, v, out, lse, *ranges, listed.contiguous(), *by_key, None, 1.0)
        for grad, expected in zip(some, (full[0], full[1][listed], full[2][listed]), strict=True):
            torch.testing.assert_close(grad, expected)


def test_log_sum_exp():
    layout = lk.TokenLayout.from_spans(MIXED)
    q, k, v, _ = make_inputs(layout.num_tokens, layout.num_tokens, 2, 1, 16)
    _, lse = _ops.hybrid_attention(q, k, v, layout.key_start, layout.key_end, None, 0.5)
    scores = torch.einsum("nhd,md->hnm", q.double(), k[:, 0].double()) * 0.5
    expected = scores.masked_fill(~reference.hybrid_mask(layout), float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)


def test_cache_equals_no_cache():
    """Documents continued through a key-value cache, whose other slots hold NaN, equal the whole documents."""
    before, after = (("text", 40), ("image", 30)), (("text", 2), ("image", 70), ("text", 5))
    whole = lk.TokenLayout.from_spans([[*before, *after], [("text", 9), *after]])
    rest = lk.TokenLayout.from_spans([after, after], cached_lengths=[70, 9], cache_starts=[0, 200], cache_slots=400)
    q, k, v, _ = make_inputs(whole.num_tokens, whole.num_tokens, 4, 2, 16)
    expected = hybrid_attention(q, k, v, whole)
    k_cache, v_cache = torch.full((2, 400, 2, 16), float("nan"))
    for cache, rows in ((k_cache, k), (v_cache, v)):
        cache[:147] = rows[:147]
        cache[200:286] = rows[147:]
    cached_rows = torch.cat([torch.arange(70, 147), torch.arange(147 + 9, whole.num_tokens)])
    out = hybrid_attention(q[cached_rows], k_cache, v_cache, rest)
    torch.testing.assert_close(out, expected[cached_rows])


@settings(max_examples=60)
@given(documents, st.booleans(), st.data())
def test_documents_anywhere_in_a_cache(documents, padded, data):
    """Gaps of any size between them, full of NaN, and documents that pad the batch at one place behind them."""
    cached, starts, end = [data.draw(st.integers(0, 90)) for _ in documents], [], 0
    for length, document in zip(cached, documents, strict=True):
        starts.append(end + data.draw(st.integers(0, 70)))
        end = starts[-1] + length + sum(n for _, n in document)
    if padded:
        documents, cached, starts = documents + [[("image", 5)]] * 3, cached + [2] * 3, starts + [end + 1] * 3
    layout = lk.TokenLayout.from_spans(documents, cached_lengths=cached, cache_starts=starts, cache_slots=end + 9)
    q, k, v, _ = make_inputs(layout.num_tokens, layout.num_keys, 6, 2, 16)
    expected = reference.hybrid_attention(q, k, v, layout)
    hidden = ~reference.hybrid_mask(layout).any(0)
    k[hidden] = v[hidden] = float("nan")
    torch.testing.assert_close(hybrid_attention(q, k, v, layout), expected, rtol=1e-4, atol=1e-5)


def test_a_document_of_nan_spoils_no_other():
    """Its neighbours in a tile of keys and in a block of queries come out as if it were not there."""
    documents = [[("text", 2)], [("image", 3)], [("text", 1)]]
    layout = lk.TokenLayout.from_spans(documents, cached_lengths=[4, 1, 0], cache_starts=[0, 6, 10], cache_slots=64)
    q, k, v, _ = make_inputs(layout.num_tokens, layout.num_keys, 4, 2, 16)
    expected = hybrid_attention(q, k, v, layout)
    k[6:10] = v[6:10] = float("nan")
    out = hybrid_attention(q, k, v, layout)
    assert out[2:5].isnan().all()
    assert torch.equal(out[[0, 1, 5]], expected[[0, 1, 5]])


def test_queries_that_see_nothing_give_zero():
    q, k, v, dout = make_inputs(3, 4, 1, 1, 8)
    key_start, key_end = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 2], [2, 2, 4]))
    out, lse = _ops.hybrid_attention(q, k, v, key_start, key_end, None, 1.0)
    assert out[1].eq(0).all() and lse[0, 1] == float("-inf") and out[[0, 2]].ne(0).all()
    query_start, query_end = ranges_by_key(key_start, key_end, 4)
    grad_key = torch.arange(4, dtype=torch.int32)
    grads = _ops.hybrid_attention_backward(
        dout, q, k, v, out, lse, key_start, key_end, grad_key, query_start, query_end, None, 1.0
    )
    assert all(grad.isfinite().all() for grad in grads) and grads[0][1].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_and_one_token(dtype):
    empty = lk.TokenLayout.from_spans([])
    q, k, v, dout = make_inputs(0, 0, 4, 2, 16, dtype)
    assert [x.shape[0] for x in run(lambda *x: hybrid_attention(*x, empty), q, k, v, dout, dtype)] == [0, 0, 0, 0]
    one = lk.TokenLayout.from_spans([[("image", 1)]])
    q, k, v, _ = make_inputs(1, 1, 4, 2, 16, dtype)
    torch.testing.assert_close(hybrid_attention(q, k, v, one), v.repeat_interleave(2, dim=1))


@given(documents)
def test_ranges_by_key(documents):
    layout = lk.TokenLayout.from_spans(documents)
    query_start, query_end = ranges_by_key(layout.key_start, layout.key_end, layout.num_tokens)
    assert query_start.equal(layout.mask.query_start) and query_end.equal(layout.mask.query_end)


def test_same_bits_again_and_for_any_number_of_threads():
    layout = lk.TokenLayout.from_spans([[("text", 100), ("image", 300), ("text", 50)], [("text", 40), ("image", 64)]])
    inputs = make_inputs(layout.num_tokens, layout.num_tokens, 6, 2, 32)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4, 4):
            torch.set_num_threads(threads)
            results.append(run(lambda *x: hybrid_attention(*x, layout), *inputs, torch.float32))
    finally:
        torch.set_num_threads(num_threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


def test_memory_is_linear():
    """20,000 tokens: a mask or a score matrix of one byte per entry would be 400 MB."""
    layout = lk.TokenLayout.from_spans([[("text", 100), ("image", 28)]] * 140 + [[("text", 2080)]], frozen_text=False)
    assert layout.num_tokens == 20000
    inputs = make_inputs(layout.num_tokens, layout.num_tokens, 2, 1, 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(lambda *x: hybrid_attention(*x, layout), *inputs, torch.float32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes; the inputs have 7.7 MB


def test_time_is_proportional_to_what_is_visible():
    """64 documents of 64 tokens hold 1/64 of the visible pairs of one document of 4096."""

    def seconds(documents):
        layout = lk.TokenLayout.from_spans(documents)
        q, k, v, dout = make_inputs(4096, 4096, 2, 2, 32)
        for x in (q, k, v):
            x.requires_grad_()
        times = []
        for _ in range(3):
            start = time.process_time()
            hybrid_attention(q, k, v, layout).backward(dout)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds([[("image", 64)]] * 64) < 0.15 * seconds([[("image", 4096)]])


def test_operator_registrations():
    layout = lk.TokenLayout.from_spans([[("text", 3), ("image", 4), ("text", 2)]])
    for dtype in DTYPES:
        q, k, v, dout = make_inputs(9, 9, 2, 1, 16, dtype)
        ranges, scale = (layout.key_start, layout.key_end), 0.25
        out, lse = _ops.hybrid_attention(q, k, v, *ranges, None, scale)
        listed = torch.arange(2, 9, dtype=torch.int32)
        by_key = layout.mask.query_start[2:].clone(), layout.mask.query_end[2:].clone()
        torch.library.opcheck(
            _ops.hybrid_attention_backward, (dout, q, k, v, out, lse, *ranges, listed, *by_key, None, scale)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        row = torch.randperm(9).to(torch.int32)
        # float32 compares gradients at tolerances that bfloat16 cannot reach
        torch.library.opcheck(_ops.hybrid_attention, (*leaves, *ranges, row, scale), rtol=1e-2, atol=1e-2)


def test_out_row_forward_and_backward():
    layout = lk.TokenLayout.from_spans(MIXED)
    n = layout.num_tokens
    row = torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    q, k, v, dout = make_inputs(n, n, 6, 2, 16)
    expected = run(lambda *x: hybrid_attention(*x, layout, 1.0), q, k, v, dout, torch.float32)
    ranges = layout.key_start, layout.key_end
    permuted_dout = torch.empty_like(dout)
    permuted_dout[row.long()] = dout
    result = run(lambda *x: _ops.hybrid_attention(*x, *ranges, row, 1.0)[0], q, k, v, permuted_dout, torch.float32)
    assert result[0][row.long()].equal(expected[0])
    assert all(a.equal(b) for a, b in zip(result[1:], expected[1:], strict=True))


def test_gradients_of_some_inputs():
    layout = lk.TokenLayout.from_spans(MIXED)
    n = layout.num_tokens
    q, k, v, dout = make_inputs(n, n, 2, 1, 16)
    expected = dict(
        zip("qkv", run(lambda *x: hybrid_attention(*x, layout), q, k, v, dout, torch.float32)[1:], strict=True)
    )
    for wanted in ("q", "k", "v", "qv"):
        inputs = {name: x.clone().requires_grad_(name in wanted) for name, x in zip("qkv", (q, k, v), strict=True)}
        hybrid_attention(*inputs.values(), layout).backward(dout)
        for name, x in inputs.items():
            assert x.grad is None if name not in wanted else x.grad.double().equal(expected[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_without_graph_break(dtype):
    layout = lk.TokenLayout.from_spans(MIXED)
    n = layout.num_tokens
    inputs = make_inputs(n, n, 6, 2, 16, dtype)
    compiled = torch.compile(lambda q, k, v: hybrid_attention(2 * q, k, v, layout), fullgraph=True, backend="aot_eager")
    result = run(compiled, *inputs, dtype)
    expected = run(lambda q, k, v: hybrid_attention(2 * q, k, v, layout), *inputs, dtype)
    assert all(a.equal(b) for a, b in zip(result, expected, strict=True))


def test_flops_count_what_is_visible():
    layout = lk.TokenLayout.from_spans(MIXED)
    n, area = layout.num_tokens, int(reference.hybrid_mask(layout).sum())
    q, k, v, dout = make_inputs(n, n, 6, 2, 16)
    with FlopCounterMode(display=False) as counter:
        run(lambda *x: hybrid_attention(*x, layout), q, k, v, dout, torch.float32)
    assert counter.get_total_flops() == (4 + 10) * area * 6 * 16
    meta = lk.TokenLayout.from_spans(MIXED, device="meta")
    with FlopCounterMode(display=False) as counter:
        hybrid_attention(*(x.to("meta") for x in (q, k, v)), meta)
    assert counter.get_total_flops() == 4 * n * n * 6 * 16


def test_reference_backend_and_other_dtypes():
    layout = lk.TokenLayout.from_spans(MIXED)
    n = layout.num_tokens
    q, k, v, _ = make_inputs(n, n, 2, 1, 16)
    assert hybrid_attention(q, k, v, layout, backend="reference").equal(reference.hybrid_attention(q, k, v, layout))
    wide = [x.double() for x in (q, k, v)]
    assert hybrid_attention(*wide, layout).equal(reference.hybrid_attention(*wide, layout))


BAD_INPUTS = {
    "flat q": (lambda q, k, v: (q.flatten(1), k, v), r"q must be \[N, H, D\]"),
    "k unlike v": (lambda q, k, v: (q, k, v[:, :1]), "k and v both"),
    "another head size": (lambda q, k, v: (q, k[..., :8], v[..., :8]), "k and v both"),
    "heads": (lambda q, k, v: (q[:, :3], k, v), "must be a multiple of the 2 heads of k and v, got 3"),
    "dtype": (lambda q, k, v: (q, k.bfloat16(), v), "one dtype"),
    "query rows": (lambda q, k, v: (q[1:], k, v), "q must have"),
    "key rows": (lambda q, k, v: (q, k[1:], v[1:]), "k must have"),
    "device": (lambda q, k, v: (q.to("meta"), k, v), "q must be on"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name):
    spoil, message = BAD_INPUTS[name]
    q, k, v, _ = make_inputs(9, 9, 4, 2, 16)
    layout = lk.TokenLayout.from_spans([[("text", 3), ("image", 4), ("text", 2)]])
    with pytest.raises(ValueError, match=message):
        hybrid_attention(*spoil(q, k, v), layout)


def test_no_backward_through_a_cache():
    layout = lk.TokenLayout.from_spans([[("text", 2)]], cached_lengths=[1], cache_starts=[0], cache_slots=4)
    q, k, v, _ = make_inputs(2, 4, 1, 1, 16)
    with pytest.raises(ValueError, match=r"no backward.*torch\.no_grad"):
        hybrid_attention(q.requires_grad_(), k, v, layout)
    with torch.no_grad():
        assert hybrid_attention(q, k, v, layout).shape == (2, 1, 16)


@pytest.mark.parametrize(
    ("key_start", "key_end"),
    [([0, 0, 1, 0], [1, 2, 3, 4]), ([0, 0, 0, 0], [1, 2, 3, 5]), ([-1, 0, 0, 0], [1, 2, 3, 4])],
)
def test_op_refuses_ranges_that_would_read_foreign_memory(key_start, key_end):
    q, k, v, _ = make_inputs(4, 4, 1, 1, 16)
    ranges = [torch.tensor(x, dtype=torch.int32) for x in (key_start, key_end)]
    with pytest.raises(RuntimeError, match="must not decrease and lie within the 4 keys"):
        _ops.hybrid_attention(q, k, v, *ranges, None, 1.0)

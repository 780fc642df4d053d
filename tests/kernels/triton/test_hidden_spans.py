"""The Triton attention kernels are right with hidden spans, forward and backward, in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmfusion_kernels as lk
from lmfusion_kernels.attention.interface import AttentionCall
from lmfusion_kernels.attention.reference import Reference
from tests.kernels.triton import interpreter
from tests.kernels.triton.test_hybrid_attention import BY_POINTER, LARGE, MODULE, SMALL, UNSHRUNK, int32, make_inputs

pytest.importorskip("triton", reason="triton is not installed")

BATCHES = {
    "a noised copy before a clean one": [[("text", 9), ("image", 70, "hidden"), ("image", 70), ("text", 30)]],
    "several documents": [[("image", 20, "hidden"), ("text", 9)], [("text", 5), ("text", 40, "hidden"), ("image", 8)]],
    "all hidden": [[("image", 40, "hidden")], [("text", 9, "hidden"), ("marker", 1, "hidden")]],
    "at the borders of tiles": [[("text", 32), *[("image", 32, "hidden")] * 2, ("text", 64), ("image", 1, "hidden")]],
    "a long way": [[("text", 150), ("full", [("marker", 1), ("image", 9), ("marker", 1)], "hidden"), ("text", 20)]],
}
lengths = st.one_of(st.integers(1, 9), st.integers(10, 60))
spans = st.tuples(st.sampled_from(["text", "image", "marker"]), lengths, st.booleans()).map(
    lambda span: (*span[:2], "hidden") if span[2] else span[:2]
)
documents = st.lists(st.lists(spans, min_size=1, max_size=4), min_size=1, max_size=3)


def forward_and_backward(dout, q, k, v, ranges, by_key, out_row, scale, hidden, tiles):
    """In the interpreter: out and lse by query, and the gradients."""
    from lmfusion_kernels.triton import hybrid_attention

    out, lse = hybrid_attention.forward(q, k, v, *ranges, out_row, scale, *hidden, tiles=tiles)
    grads = hybrid_attention.backward(dout, q, k, v, out, lse, *ranges, *by_key, out_row, scale, *hidden, tiles=tiles)
    return out, lse, *grads


def assert_as_good_as_reference(layout, rows, heads, head_dim, dtype, tiles, seed=0):
    """Errors against float64, as root mean squares: at most twice those of plain PyTorch in the same dtype."""
    num_queries = layout.num_active if rows == "active" else layout.num_tokens
    q, k, v, dout = make_inputs(num_queries, layout.num_tokens, *heads, head_dim, dtype, seed)
    targets = []
    for wide in (torch.float64, dtype):
        call = AttentionCall(*(value.to(wide) for value in (q, k, v)), layout, rows, 0.3)
        out, lse = Reference().forward(call)
        targets.append([out, lse, *Reference().backward(call, dout.to(wide), out, lse)])
    *ranges, out_row = call.key_ranges()
    result = interpreter.call(
        "tests.kernels.triton.test_hidden_spans", "forward_and_backward", dout, q, k, v, ranges, call.query_ranges(),
        out_row, 0.3, call.hidden_ends(), tiles,
    )  # fmt: skip
    floor = 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 4
    for name, exact, plain, value in zip(("out", "lse", "dq", "dk", "dv"), *targets, result, strict=True):
        assert value.shape == exact.shape and value.isfinite().all(), name
        error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (value, plain))
        assert error <= 2 * allowed + floor, f"{name}: error {error:.2e}, allowed {2 * allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_equals_reference(name, dtype):
    layout = lk.TokenLayout.from_spans(BATCHES[name])
    for tiles in (LARGE, SMALL):
        assert_as_good_as_reference(layout, "all", (2, 1), 16, dtype, tiles)


@settings(max_examples=8, phases=UNSHRUNK)
@given(
    documents,
    st.sampled_from([(1, 1), (2, 1)]),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([LARGE, SMALL, BY_POINTER]),
    st.integers(0, 99),
)
def test_random_documents(documents, heads, dtype, tiles, seed):
    """All rows, or only the active ones, stored in tower order as in a block with frozen text."""
    layout = lk.TokenLayout.from_spans(documents)
    assert_as_good_as_reference(layout, "all", heads, 16, dtype, tiles, seed)
    if layout.num_active:
        assert_as_good_as_reference(layout, "active", heads, 16, dtype, tiles, seed)


def test_what_is_hidden_is_not_read_from_outside():
    """Queries after a hidden image have the same bits if it holds NaN, because its tiles are skipped."""
    layout = lk.TokenLayout.from_spans([[("text", 64), ("image", 64, "hidden"), ("text", 128)]])
    q, k, v, _ = make_inputs(256, 256, 1, 1, 16)
    arguments = layout.key_start, layout.key_end, None, 0.3, layout.mask.visible_end, layout.hidden.run_end
    out, _ = interpreter.call(MODULE, "forward", q, k, v, *arguments, tiles=SMALL)
    k[64:128] = v[64:128] = float("nan")
    other, _ = interpreter.call(MODULE, "forward", q, k, v, *arguments, tiles=SMALL)
    assert other[64:128].isnan().all() and other[128:].equal(out[128:])


def test_bad_vectors():
    q, k, v, _ = make_inputs(9, 9, 1, 1, 16)
    start, end = int32([0] * 9), int32([9] * 9)
    with pytest.raises(ValueError, match="visible_end and run_end must be given together"):
        interpreter.call(MODULE, "forward", q, k, v, start, end, None, 1.0, end)
    with pytest.raises(ValueError, match="run_end must be a contiguous int32 vector with 9 entries"):
        interpreter.call(MODULE, "forward", q, k, v, start, end, None, 1.0, end, end[1:])

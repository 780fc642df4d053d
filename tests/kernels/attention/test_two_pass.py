"""Two causal calls give hybrid attention, forward and backward, to the last bits of float64, for any batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from lmfusion_kernels.attention import dispatch
from lmfusion_kernels.attention.interface import AttentionCall
from lmfusion_kernels.attention.reference import Reference
from lmfusion_kernels.attention.two_pass import TwoPass
from tests.kernels.attention.packed_causal import PlainPackedCausal

spans = st.tuples(st.sampled_from(["text", "image", "marker"]), st.integers(1, 12))
documents = st.lists(st.lists(spans, min_size=1, max_size=5), min_size=1, max_size=5)
TOLERANCE = 1e-12

BATCHES = {
    "mixed": [[("text", 5), ("image", 7), ("text", 3)], [("image", 4), ("text", 2)], [("text", 6)]],
    "text alone": [[("text", 5)], [("text", 1)]],
    "image alone": [[("image", 9)], [("image", 2)]],
    "single-token images": [[("image", 1), ("text", 2), ("image", 1)], [("image", 1)]],
    "two images in a row": [[("text", 2), ("image", 3), ("image", 4)]],
    "one token": [[("image", 1)]],
}


def make_inputs(layout, rows, num_heads=4, num_kv_heads=2, head_dim=8, seed=0):
    """q of the queries, k, v and a gradient in the order of the output, float64."""
    generator = torch.Generator().manual_seed(seed)
    n = {"all": layout.num_tokens, "active": layout.num_active, "constant": layout.num_constant}[rows]
    sizes = (n, num_heads), (layout.num_keys, num_kv_heads), (layout.num_keys, num_kv_heads), (n, num_heads)
    return [torch.randn(*size, head_dim, dtype=torch.float64, generator=generator) for size in sizes]


def assert_exact(layout, rows, seed=0, scale=0.3):
    q, k, v, dout = make_inputs(layout, rows, seed=seed)
    kernel, specification = TwoPass(PlainPackedCausal()), Reference()
    out, lse = kernel.forward(AttentionCall(q, k, v, layout, rows, scale))
    expected_out, expected_lse = specification.forward(AttentionCall(q, k, v, layout, rows, scale))
    assert (out - expected_out).abs().max() <= TOLERANCE
    assert (lse - expected_lse).abs().max() <= TOLERANCE
    if rows == "constant" or layout.is_cached:
        return
    grads = kernel.backward(AttentionCall(q, k, v, layout, rows, scale), dout, out, lse)
    expected = specification.backward(AttentionCall(q, k, v, layout, rows, scale), dout, expected_out, expected_lse)
    for name, grad, target in zip(("dq", "dk", "dv"), grads, expected, strict=True):
        assert grad.shape == target.shape, name
        assert (grad - target).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("frozen_text", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_equals_the_specification(name, frozen_text):
    layout = lk.TokenLayout.from_spans(BATCHES[name], frozen_text=frozen_text)
    for rows in ("all", "active", "constant"):
        if rows == "all" or (layout.num_active if rows == "active" else layout.num_constant):
            assert_exact(layout, rows)


@settings(max_examples=60)
@given(documents, st.booleans(), st.integers(0, 99))
def test_random_documents(documents, frozen_text, seed):
    layout = lk.TokenLayout.from_spans(documents, frozen_text=frozen_text)
    assert_exact(layout, "all", seed)
    if layout.num_active:
        assert_exact(layout, "active", seed)
    if layout.num_constant:
        assert_exact(layout, "constant", seed)


@settings(max_examples=40)
@given(documents, st.data())
def test_cached_layouts(documents, data):
    cached = [data.draw(st.integers(0, 9)) for _ in documents]
    starts, end = [], 0
    for length, document in zip(cached, documents, strict=True):
        starts.append(end + data.draw(st.integers(0, 9)))
        end = starts[-1] + length + sum(n for _, n in document)
    rows = end + data.draw(st.integers(3, 9))
    if data.draw(st.booleans()):  # a batch filled up
        documents, cached, starts = documents + [[("image", 3)]] * 2, cached + [0] * 2, starts + [end] * 2
    layout = lk.TokenLayout.from_spans(documents, cached_lengths=cached, cache_starts=starts, cache_slots=rows)
    assert_exact(layout, "all")
    assert_exact(layout, "active")


def test_rows_of_the_cache_that_hold_nothing_are_not_read():
    documents, cache = [[("text", 1)], [("image", 3)]], {"cache_starts": [2, 7], "cache_slots": 14}
    layout = lk.TokenLayout.from_spans(documents, cached_lengths=[2, 0], **cache)
    q, k, v, _ = make_inputs(layout, "all")
    expected = Reference().forward(AttentionCall(q, k, v, layout, "all", 0.3))[0]
    for x in (k, v):
        x[:2] = x[5:7] = x[10:] = float("nan")
    assert (
        TwoPass(PlainPackedCausal()).forward(AttentionCall(q, k, v, layout, "all", 0.3))[0] - expected
    ).abs().max() <= TOLERANCE


def test_the_second_call_is_made_for_triangles_alone():
    """Its tokens: those of all images except the last (queries) or the first (keys) of each; none without images."""
    for name, num_rows in (("mixed", 6 + 3), ("text alone", 0), ("single-token images", 0), ("image alone", 8 + 1)):
        layout = lk.TokenLayout.from_spans(BATCHES[name])
        packed = PlainPackedCausal()
        q, k, v, _ = make_inputs(layout, "all")
        TwoPass(packed).forward(AttentionCall(q, k, v, layout, "all", 1.0))
        assert packed.calls == [(layout.num_tokens,) * 2] + [(num_rows,) * 2] * (num_rows > 0)


def test_an_empty_batch():
    layout = lk.TokenLayout.from_spans([])
    q, k, v, dout = make_inputs(layout, "all")
    kernel = TwoPass(PlainPackedCausal())
    out, lse = kernel.forward(AttentionCall(q, k, v, layout, "all", 1.0))
    assert out.shape == q.shape and lse.shape == (4, 0)
    assert [x.shape for x in kernel.backward(AttentionCall(q, k, v, layout, "all", 1.0), dout, out, lse)] == [
        q.shape,
        k.shape,
        v.shape,
    ]


def test_documents_without_active_rows_get_no_gradients():
    """No token has a backward: nothing is computed, and the gradients are empty."""
    layout = lk.TokenLayout.from_spans([[("text", 4)]])
    q, k, v, dout = make_inputs(layout, "active")
    kernel = TwoPass(PlainPackedCausal())
    out, lse = kernel.forward(AttentionCall(q, k, v, layout, "active", 1.0))
    grads = kernel.backward(AttentionCall(q, k, v, layout, "active", 1.0), dout, out, lse)
    assert [x.shape[0] for x in grads] == [0, 0, 0]
    with pytest.raises(ValueError, match="constant tokens have no backward"):
        kernel.backward(AttentionCall(q, k, v, layout, "constant", 1.0), dout, out, lse)


def test_the_merge_survives_scores_of_any_size():
    """Scores in the thousands: their exponentials would overflow, their log-sum-exps do not."""
    layout = lk.TokenLayout.from_spans(BATCHES["mixed"])
    q, k, v, _ = make_inputs(layout, "all")
    out, lse = TwoPass(PlainPackedCausal()).forward(AttentionCall(1e2 * q, 1e2 * k, v, layout, "all", 1.0))
    expected, expected_lse = Reference().forward(AttentionCall(1e2 * q, 1e2 * k, v, layout, "all", 1.0))
    assert (out - expected).abs().max() <= 1e-9
    torch.testing.assert_close(lse, expected_lse)


def test_strides_and_signs_that_kernels_do_not_take():
    """Strided heads, an expanded gradient as from `out.sum()`, an unaligned address, a negative scale."""
    layout = lk.TokenLayout.from_spans(BATCHES["mixed"])
    q, k, v, dout = make_inputs(layout, "all")
    q = q.transpose(0, 2).contiguous().transpose(0, 2)
    k = torch.cat([k.new_zeros(3), k.flatten()])[3:].view(k.shape)
    dout = dout[:1, :1, :1].expand(dout.shape)
    dispatch.KERNELS["plain"] = TwoPass(PlainPackedCausal())
    try:
        out, lse = dispatch.forward("plain", AttentionCall(q, k, v, layout, "all", -0.3))
        grads = dispatch.backward("plain", AttentionCall(q, k, v, layout, "all", -0.3), dout, out, lse)
    finally:
        del dispatch.KERNELS["plain"]
    expected = Reference().backward(AttentionCall(q, k, v, layout, "all", -0.3), dout, out, lse)
    assert (out - Reference().forward(AttentionCall(q, k, v, layout, "all", -0.3))[0]).abs().max() <= TOLERANCE
    assert all((grad - target).abs().max() <= TOLERANCE for grad, target in zip(grads, expected, strict=True))


def test_equals_the_public_reference():
    """`Reference` computes what `lmfusion_kernels.reference` specifies, from the same vectors."""
    layout = lk.TokenLayout.from_spans(BATCHES["mixed"])
    q, k, v, _ = make_inputs(layout, "all")
    out, _ = Reference().forward(AttentionCall(q, k, v, layout, "all", 0.3))
    torch.testing.assert_close(out, reference.hybrid_attention(q, k, v, layout, 0.3), rtol=0, atol=1e-14)

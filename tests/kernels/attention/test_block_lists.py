"""The block lists hold the mask, and FlexAttention, which reads them, computes hybrid attention."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from lmfusion_kernels.attention import flex
from lmfusion_kernels.attention.block_lists import block_lists
from lmfusion_kernels.attention.interface import AttentionCall, ranges_by_key
from lmfusion_kernels.attention.reference import Reference
from tests.kernels.attention.test_two_pass import make_inputs

spans = st.tuples(st.sampled_from(["text", "image", "marker"]), st.integers(1, 9))
documents = st.lists(st.lists(spans, min_size=1, max_size=5), min_size=1, max_size=5)
MIXED = [[("text", 70), ("image", 150), ("text", 30)], [("image", 5), ("text", 1)]]


def assert_lists_hold_the_mask(start, end, num_columns, size, has_gaps=False):
    """Full blocks are full, those not listed empty, the others partly visible (with gaps: or empty)."""
    column = np.arange(num_columns)
    mask = (column >= start.numpy()[:, None]) & (column < end.numpy()[:, None])
    num_partial, partial, num_full, full = block_lists(start, end, num_columns, size)
    row_blocks, column_blocks = -(-mask.shape[0] // size), -(-num_columns // size)
    assert partial.shape == full.shape == (row_blocks, column_blocks)
    assert all(x.dtype == torch.int32 for x in (num_partial, partial, num_full, full))
    for i in range(row_blocks):
        listed_full, listed_partial = full[i, : num_full[i]].tolist(), partial[i, : num_partial[i]].tolist()
        for j in range(column_blocks):
            block = mask[i * size : (i + 1) * size, j * size : (j + 1) * size]
            whole = block.all() and block.shape == (size, size)
            assert (j in listed_full) == whole
            assert (j in listed_partial) == (block.any() and not whole) or (has_gaps and not block.any())
        assert sorted({*listed_partial}) == listed_partial and sorted({*listed_full}) == listed_full
    assert (partial < max(column_blocks, 1)).all() and (full < max(column_blocks, 1)).all()  # also past the counts


@given(documents, st.sampled_from([2, 4, 7]), st.booleans())
def test_lists_of_random_documents(documents, size, frozen_text):
    layout = lk.TokenLayout.from_spans(documents, frozen_text=frozen_text)
    n = layout.num_tokens
    assert_lists_hold_the_mask(layout.key_start, layout.key_end, n, size)
    assert_lists_hold_the_mask(layout.mask.query_start, layout.mask.query_end, n, size)
    assert_lists_hold_the_mask(layout.active.key_start, layout.active.key_end, n, size, has_gaps=True)
    assert_lists_hold_the_mask(layout.constant.key_start, layout.constant.key_end, n, size, has_gaps=True)
    by_key = ranges_by_key(layout.active.key_start, layout.active.key_end, n)
    assert_lists_hold_the_mask(*by_key, layout.num_active, size)


def test_whole_blocks_are_most_of_a_long_document():
    """256 blocks of 128 in a causal document of 2048 tokens: 120 whole, 16 on the diagonal."""
    layout = lk.TokenLayout.from_spans([[("text", 2048)]])
    lists = block_lists(layout.key_start, layout.key_end, 2048, 128)
    assert (lists.num_full.sum(), lists.num_partial.sum()) == (120, 16)


@pytest.fixture
def gradients_on_the_cpu(monkeypatch):
    """FlexAttention refuses gradients on the CPU, although its uncompiled form has them."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("gradients_on_the_cpu")
def test_flex_equals_the_specification():
    layout = lk.TokenLayout.from_spans(MIXED)
    kernel, specification = flex.Flex(), Reference()
    for rows in ("all", "active", "constant"):
        q, k, v, dout = make_inputs(layout, rows, head_dim=16)
        out, lse = kernel.forward(AttentionCall(q, k, v, layout, rows, 0.3))
        expected = specification.forward(AttentionCall(q, k, v, layout, rows, 0.3))
        assert (out - expected[0]).abs().max() <= 1e-12 and (lse - expected[1]).abs().max() <= 1e-12
        if rows == "constant":
            continue
        grads = kernel.backward(AttentionCall(q, k, v, layout, rows, 0.3), dout, out, lse)
        for grad, target in zip(
            grads, specification.backward(AttentionCall(q, k, v, layout, rows, 0.3), dout, out, lse), strict=True
        ):
            assert (grad - target).abs().max() <= 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_by_name():
    layout = lk.TokenLayout.from_spans(MIXED)
    q, k, v, _ = make_inputs(layout, "all", head_dim=16)
    out = lk.hybrid_attention(q, k, v, layout, backend="flex")
    torch.testing.assert_close(out, reference.hybrid_attention(q, k, v, layout))
    with pytest.raises(ValueError, match="flex attention was asked for, but it has no gradients on the CPU"):
        lk.hybrid_attention(q.requires_grad_(), k, v, layout, backend="flex")
    cached = lk.TokenLayout.from_spans([[("text", 1)]], cached_lengths=[1], cache_starts=[0], cache_slots=4)
    with pytest.raises(ValueError, match="flex attention was asked for, but it takes no key-value cache"):
        lk.hybrid_attention(*make_inputs(cached, "all")[:3], cached, backend="flex")
    empty = lk.TokenLayout.from_spans([])
    assert lk.hybrid_attention(*make_inputs(empty, "all")[:3], empty, backend="flex").shape == (0, 4, 8)

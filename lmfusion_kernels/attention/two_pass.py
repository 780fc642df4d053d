"""Hybrid attention by kernels that know causal attention only, exactly, forward and backward.

Two calls on packed sequences, both causal:

1. Every document, whose queries see all keys up to their own.
2. What is missing is, for each image, the triangle above the diagonal: token i of an image sees the tokens after it.
   Reversed, with all tokens except the last as queries and all except the first as keys, that triangle is causal
   attention too. `lmfusion_kernels.layout.masks.CausalDocuments` has the picture and the vectors.

The results are merged by their log-sum-exp: out = sum_c exp(lse_c - lse) out_c, with lse the log of the sum of both.
The gradient of a softmax needs only its out and lse, so each call's backward gets the merged ones, and the gradients
add up. Every score is computed once: no arithmetic is added.

With hidden spans, the first call runs on *causal segments* instead of documents: the visible tokens of each document,
and each hidden segment behind a gathered copy of the visible keys before it. The second call stays the same. Still no
score is computed twice, but keys and values before hidden segments are copied once for each segment; their gradients
are added up in float32.
"""

import torch
from torch import Tensor

from lmfusion_kernels.attention.interface import (
    NO_BACKWARD_OF_CONSTANT_TOKENS,
    AttentionCall,
    AttentionProblem,
    Gradients,
    Queries,
    aligned,
)
from lmfusion_kernels.attention.packed_causal import PackedCausal, Sequences
from lmfusion_kernels.layout.token_layout import TokenLayout


class TwoPass:
    """Hybrid attention by two calls of `packed`; see the kernels' own files for what each can run."""

    is_differentiable = False

    def __init__(self, packed: PackedCausal) -> None:
        self.packed = packed

    @property
    def summary(self) -> str:
        return self.packed.summary

    def unavailable_reason(self, device: torch.device) -> str:
        return self.packed.unavailable_reason(device)

    def unsupported_reason(self, problem: AttentionProblem) -> str:
        return self.packed.unsupported_reason(problem)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if call.q.shape[0] == 0:
            return torch.empty_like(call.q), call.q.new_empty((call.q.shape[1], 0), dtype=torch.float32)
        q, k, v, layout, queries, scale = call.aligned()
        if layout.has_hidden:
            query = _segment_queries(layout, queries)
            (q_segments,), (k_segments, v_segments) = _select(query, q), _select(layout.hidden.segment_key, k, v)
            out_segments, lse_segments = self.packed.forward(
                q_segments, k_segments, v_segments, _segments(layout, queries), scale
            )
            out = torch.empty_like(out_segments).index_copy_(0, query.long(), out_segments)
            lse = torch.empty_like(lse_segments).index_copy_(1, query.long(), lse_segments)
        else:
            out, lse = self.packed.forward(q, k, v, _documents(layout, queries), scale)
        if queries == "constant":
            return out, lse
        query, key = _triangle_tokens(layout, queries)
        if query.shape[0]:
            (q_above,), (k_above, v_above) = _select(query, q), _select(key, k, v)
            out_above, lse_above = self.packed.forward(q_above, k_above, v_above, _triangles(layout), scale)
            merged, merged_lse = _merge(out.index_select(0, query), lse.index_select(1, query), out_above, lse_above)
            # Every query occurs once, so no two of these copies write the same row.
            index = query.long()
            out, lse = out.index_copy_(0, index, merged), lse.index_copy_(1, index, merged_lse)
        if queries == "active":
            out = out.index_select(0, layout.order.query_row[layout.num_constant :] - layout.num_constant)
        return out, lse

    def backward(self, call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        if call.queries == "constant":
            raise ValueError(NO_BACKWARD_OF_CONSTANT_TOKENS)
        if call.q.shape[0] == 0:
            return torch.empty_like(call.q), torch.empty_like(call.k[:0]), torch.empty_like(call.v[:0])
        call, dout = call.aligned(), aligned(dout)
        q, k, v, layout, queries, scale = call
        if queries == "active":
            assert layout.active.out_row is not None
            dout, out = _select(layout.active.out_row, dout, out)
        if layout.has_hidden:
            dq, dk, dv = self._backward_of_segments(call, dout, out, lse)
        else:
            dq, dk, dv = self.packed.backward(dout, q, k, v, out, lse, _documents(layout, queries), scale)
        query, key = _triangle_tokens(layout, queries)
        if query.shape[0]:
            dout_above, q_above, out_above = _select(query, dout, q, out)
            k_above, v_above = _select(key, k, v)
            lse_above = lse.index_select(1, query)
            grads = self.packed.backward(
                dout_above, q_above, k_above, v_above, out_above, lse_above, _triangles(layout), scale
            )
            for whole, index, above in zip((dq, dk, dv), (query, key, key), grads, strict=True):
                whole.index_copy_(0, index.long(), whole.index_select(0, index) + above)
        if queries == "active" and layout.num_constant:
            keys, _, _ = call.query_ranges()
            dk, dv = _select(keys, dk, dv)
        return dq, dk, dv

    def _backward_of_segments(self, call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """dq, dk, dv in sequence order.

        A segment without queries leaves the gradients of its keys unwritten. All its keys are constant tokens.
        """
        q, k, v, layout, queries, scale = call
        query = _segment_queries(layout, queries)
        dout_segments, q_segments, out_segments = _select(query, dout, q, out)
        k_segments, v_segments = _select(layout.hidden.segment_key, k, v)
        lse_segments, segments = lse.index_select(1, query), _segments(layout, queries)
        grads = self.packed.backward(
            dout_segments, q_segments, k_segments, v_segments, out_segments, lse_segments, segments, scale
        )
        dq = torch.empty_like(grads[0]).index_copy_(0, query.long(), grads[0])
        wide = torch.promote_types(k.dtype, torch.float32)
        dk, dv = (
            torch.zeros(whole.shape, dtype=wide, device=whole.device)
            .index_add_(0, layout.hidden.segment_key.long(), copies.to(wide))
            .to(whole.dtype)
            for whole, copies in ((k, grads[1]), (v, grads[2]))
        )
        return dq, dk, dv


def _documents(layout: TokenLayout, queries: Queries) -> Sequences:
    """The `queries` of each document, and the keys that the first call shows them."""
    causal, longest, longest_active = layout.causal, layout.longest_document, layout.counts.longest_active
    if queries == "constant":  # a prefix of each document, which sees nothing else
        start = causal.start - causal.active_start
        return Sequences(start, causal.key_start, longest, longest, start[1:] - start[:-1])
    num_keys = causal.num_keys if layout.is_cached else None
    if queries == "active":
        return Sequences(causal.active_start, causal.key_start, longest_active, longest, num_keys)
    most = longest_active if layout.is_cached else longest
    return Sequences(causal.start, causal.key_start, most, longest, num_keys)


def _segment_queries(layout: TokenLayout, queries: Queries) -> Tensor:
    """The `queries` of each causal segment, as indices among the queries of the call."""
    hidden = layout.hidden
    if queries == "constant":
        return hidden.constant_segment_query
    return hidden.active_segment_query if queries == "active" else hidden.segment_query


def _segments(layout: TokenLayout, queries: Queries) -> Sequences:
    """The causal segments of a layout with hidden spans, for queries in the order of `_segment_queries`."""
    hidden, longest = layout.hidden, layout.longest_document
    key_start = hidden.segment_key_start
    if queries == "constant":  # they see constant tokens, the first of each segment
        start = hidden.segment_start - hidden.active_segment_start
        return Sequences(start, key_start, longest, longest, hidden.constant_num_keys)
    if queries == "active":
        return Sequences(hidden.active_segment_start, key_start, layout.counts.longest_active, longest)
    return Sequences(hidden.segment_start, key_start, longest, longest)


def _triangle_tokens(layout: TokenLayout, queries: Queries) -> tuple[Tensor, Tensor]:
    """The rows of q and the rows of k that the triangles consist of."""
    key = layout.causal.triangle_query
    query = layout.causal.active_triangle_query if queries == "active" else key
    if layout.is_cached:
        assert layout.mask.key is not None
        key = layout.mask.key.index_select(0, key)
    return query, key + 1


def _triangles(layout: TokenLayout) -> Sequences:
    start, longest = layout.causal.triangle_start, layout.counts.longest_triangle
    return Sequences(start, start, longest, longest)


def _select(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.index_select(0, index) for x in tensors)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention to two disjoint sets of keys from the attention to each. out [n, H, D], lse [H, n]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((lse_c - lse).exp().t()[..., None] for lse_c in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse

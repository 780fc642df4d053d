"""How do kernels that know causal attention alone compute hybrid attention, exactly, forward and backward?

With two calls on packed rows, both causal:

1. every document, whose queries see all keys up to their own;
2. what is missing is, for each image, the triangle above the diagonal: row i of an image sees the rows after it. Turned
   around, the rows but the last as queries and the rows but the first as keys, that triangle is causal attention too.

The results are merged by their log-sum-exp: out = sum_c exp(lse_c - lse) out_c, with lse the log of the sum of both.
The gradient of a softmax needs of it only out and lse, so each call's backward gets the merged ones, and the gradients
add up. Every score is computed once: no arithmetic is added. lmfusion_kernels/layout.py has the vectors.
"""

from typing import Protocol

import torch
from torch import Tensor

from lmfusion_kernels.attention.case import Case, QueryRows, aligned
from lmfusion_kernels.layout import TokenLayout


class PackedCausal(Protocol):
    """Causal attention of packed sequences, as FlashAttention has it.

    Sequence b has the queries [query_start[b], query_start[b + 1]) of q [total_q, H, D] and its keys begin at row
    key_start[b] of k, v [total_k, H_kv, D]; there are num_keys[b] of them, or as many as to key_start[b + 1] without
    num_keys (int32 all, key_start and num_keys on the device). Its last query sees its last key: of n queries and m
    keys, query i sees the first m - n + i + 1 keys. max_queries, max_keys: no sequence has more.
    """

    @property
    def summary(self) -> str: ...

    def why_absent(self, device: torch.device) -> str: ...

    def why_not(self, case: Case) -> str: ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_start: Tensor,
        key_start: Tensor,
        max_queries: int,
        max_keys: int,
        scale: float,
        num_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """out [total_q, H, D] and lse [H, total_q], the log of the sum of exp(score)."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        query_start: Tensor,
        key_start: Tensor,
        max_queries: int,
        max_keys: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv; what they hold of keys that no query sees is not read."""
        ...


class TwoCalls:
    """Hybrid attention by two calls of `packed`; see the kernels' own files for what each can run."""

    is_differentiable = False

    def __init__(self, packed: PackedCausal) -> None:
        self.packed = packed

    @property
    def summary(self) -> str:
        return self.packed.summary

    def why_absent(self, device: torch.device) -> str:
        return self.packed.why_absent(device)

    def why_not(self, case: Case) -> str:
        return self.packed.why_not(case)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, rows: QueryRows, scale: float
    ) -> tuple[Tensor, Tensor]:
        if q.shape[0] == 0:
            return torch.empty_like(q), q.new_empty((q.shape[1], 0), dtype=torch.float32)
        q, k, v = aligned(q), aligned(k), aligned(v)
        query_start, max_queries = _queries(layout, rows)
        if rows == "constant":  # a prefix of each document, which sees nothing else
            num_keys: Tensor | None = query_start[1:] - query_start[:-1]
        else:
            num_keys = layout.document_num_keys if layout.is_cached else None
        out, lse = self.packed.forward(
            q, k, v, query_start, layout.document_key_start, max_queries, layout.longest_document, scale, num_keys
        )
        if rows == "constant":
            return out, lse
        query_row, key_row = _triangles(layout, rows)
        if query_row.shape[0]:
            index = query_row.long()
            (q_above,), (k_above, v_above) = _select(query_row, q), _select(key_row, k, v)
            out_above, lse_above = self.packed.forward(q_above, k_above, v_above, *_triangle_bounds(layout), scale)
            merged, merged_lse = _merge(
                out.index_select(0, query_row), lse.index_select(1, query_row), out_above, lse_above
            )
            # Every row occurs once, so these copies race with nothing.
            out, lse = out.index_copy_(0, index, merged), lse.index_copy_(1, index, merged_lse)
        if rows == "active":
            out = out.index_select(0, layout.query_row[layout.num_constant :] - layout.num_constant)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: TokenLayout,
        rows: QueryRows,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if rows == "constant":
            raise ValueError("constant rows have no backward: nothing trainable reaches them")
        if q.shape[0] == 0:
            return torch.empty_like(q), torch.empty_like(k[:0]), torch.empty_like(v[:0])
        q, k, v, dout = aligned(q), aligned(k), aligned(v), aligned(dout)
        if rows == "active":
            dout, out = _select(layout.active_row, dout, out)
        query_start, max_queries = _queries(layout, rows)
        dq, dk, dv = self.packed.backward(
            dout, q, k, v, out, lse, query_start, layout.document_start, max_queries, layout.longest_document, scale
        )
        query_row, key_row = _triangles(layout, rows)
        if query_row.shape[0]:
            dout_above, q_above, out_above = _select(query_row, dout, q, out)
            k_above, v_above = _select(key_row, k, v)
            grads = self.packed.backward(
                dout_above,
                q_above,
                k_above,
                v_above,
                out_above,
                lse.index_select(1, query_row),
                *_triangle_bounds(layout),
                scale,
            )
            for whole, index, above in zip((dq, dk, dv), (query_row, key_row, key_row), grads, strict=True):
                whole.index_copy_(0, index.long(), whole.index_select(0, index) + above)
        if rows == "active" and layout.num_constant:
            dk, dv = _select(layout.active_key, dk, dv)
        return dq, dk, dv


def _queries(layout: TokenLayout, rows: QueryRows) -> tuple[Tensor, int]:
    """Where the queries of each document begin, and the most that one has."""
    if rows == "active":
        return layout.active_document_start, layout.longest_active
    if rows == "constant":
        return layout.document_start - layout.active_document_start, layout.longest_document
    return layout.document_start, layout.longest_active if layout.is_cached else layout.longest_document


def _triangles(layout: TokenLayout, rows: QueryRows) -> tuple[Tensor, Tensor]:
    """Rows of q and rows of k that the triangles are made of."""
    query_row = layout.active_triangle_row if rows == "active" else layout.triangle_row
    key_row = layout.triangle_row
    if layout.is_cached:
        key_row = layout.key_slot.index_select(0, key_row)
    return query_row, key_row + 1


def _triangle_bounds(layout: TokenLayout) -> tuple[Tensor, Tensor, int, int]:
    return layout.triangle_start, layout.triangle_start, layout.longest_triangle, layout.longest_triangle


def _select(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.index_select(0, index) for x in tensors)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention to two disjoint sets of keys from the attention to each. out [n, H, D], lse [H, n]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((part - lse).exp().t()[..., None] for part in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse

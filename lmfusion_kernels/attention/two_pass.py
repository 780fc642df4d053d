"""How do kernels that know causal attention alone compute hybrid attention, exactly, forward and backward?

With two calls on packed rows, both causal:

1. every document, whose queries see all keys up to their own;
2. what is missing is, for each image, the triangle above the diagonal: row i of an image sees the rows after it. Turned
   around, the rows but the last as queries and the rows but the first as keys, that triangle is causal attention too.

The results are merged by their log-sum-exp: out = sum_c exp(lse_c - lse) out_c, with lse the log of the sum of both.
The gradient of a softmax needs of it only out and lse, so each call's backward gets the merged ones, and the gradients
add up. Every score is computed once: no arithmetic is added. lmfusion_kernels/layout/token_layout.py has the vectors.

Where spans are hidden, the first call is about *parts* instead of documents: the visible rows of each document, and
each hidden segment behind a copy of the visible keys before it, gathered. The second call is as before. Still no score
is computed twice, but keys and values before hidden segments are copied once for each; their gradients are added up in
float32.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lmfusion_kernels.attention.interface import AttentionProblem, QueryRows, aligned
from lmfusion_kernels.layout.token_layout import TokenLayout


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where packed sequences lie: sequence b has the queries [query_start[b], query_start[b + 1]) of q [total_q, H, D],
    and its keys begin at row key_start[b] of k, v [total_k, H_kv, D]. All vectors are int32, on the device."""

    query_start: Tensor
    key_start: Tensor
    max_queries: int
    """No sequence has more."""
    max_keys: int
    num_keys: Tensor | None = None
    """Keys of each sequence; None: as many as to the next one's."""


class PackedCausal(Protocol):
    """Causal attention of packed sequences, as FlashAttention has it.

    The last query of a sequence sees its last key: of n queries and m keys, query i sees the first m - n + i + 1 keys.
    """

    @property
    def summary(self) -> str: ...

    def unavailable_reason(self, device: torch.device) -> str: ...

    def unsupported_reason(self, case: AttentionProblem) -> str: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
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
        sequences: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv; what they hold of keys that no query sees is not read."""
        ...


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

    def unsupported_reason(self, case: AttentionProblem) -> str:
        return self.packed.unsupported_reason(case)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, rows: QueryRows, scale: float
    ) -> tuple[Tensor, Tensor]:
        if q.shape[0] == 0:
            return torch.empty_like(q), q.new_empty((q.shape[1], 0), dtype=torch.float32)
        q, k, v = aligned(q), aligned(k), aligned(v)
        if layout.has_hidden:
            part_row = _part_row(layout, rows)
            (q_part,), (k_part, v_part) = _select(part_row, q), _select(layout.part_key, k, v)
            out_part, lse_part = self.packed.forward(q_part, k_part, v_part, _parts(layout, rows), scale)
            out = torch.empty_like(out_part).index_copy_(0, part_row.long(), out_part)
            lse = torch.empty_like(lse_part).index_copy_(1, part_row.long(), lse_part)
        else:
            out, lse = self.packed.forward(q, k, v, _documents(layout, rows), scale)
        if rows == "constant":
            return out, lse
        query_row, key_row = _triangles(layout, rows)
        if query_row.shape[0]:
            index = query_row.long()
            (q_above,), (k_above, v_above) = _select(query_row, q), _select(key_row, k, v)
            out_above, lse_above = self.packed.forward(q_above, k_above, v_above, _triangles_of(layout), scale)
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
        if layout.has_hidden:
            dq, dk, dv = self._backward_of_parts(dout, q, k, v, out, lse, layout, rows, scale)
        else:
            dq, dk, dv = self.packed.backward(dout, q, k, v, out, lse, _documents(layout, rows), scale)
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
                _triangles_of(layout),
                scale,
            )
            for whole, index, above in zip((dq, dk, dv), (query_row, key_row, key_row), grads, strict=True):
                whole.index_copy_(0, index.long(), whole.index_select(0, index) + above)
        if rows == "active" and layout.num_constant:
            dk, dv = _select(layout.active_key, dk, dv)
        return dq, dk, dv

    def _backward_of_parts(
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
        """dq, dk, dv in sequence order. Keys of parts without queries, whose gradients are never written, are those of
        constant rows."""
        part_row = _part_row(layout, rows)
        dout_part, q_part, out_part = _select(part_row, dout, q, out)
        k_part, v_part = _select(layout.part_key, k, v)
        grads = self.packed.backward(
            dout_part,
            q_part,
            k_part,
            v_part,
            out_part,
            lse.index_select(1, part_row),
            _parts(layout, rows),
            scale,
        )
        dq = torch.empty_like(grads[0]).index_copy_(0, part_row.long(), grads[0])
        dk, dv = (
            torch.zeros(whole.shape, dtype=torch.promote_types(whole.dtype, torch.float32), device=whole.device)
            .index_add_(0, layout.part_key.long(), part.to(torch.promote_types(part.dtype, torch.float32)))
            .to(whole.dtype)
            for whole, part in ((k, grads[1]), (v, grads[2]))
        )
        return dq, dk, dv


def _documents(layout: TokenLayout, rows: QueryRows) -> Sequences:
    """The queries `rows` of each document, and the keys that the first call shows them."""
    key_start, longest = layout.document_key_start, layout.longest_document
    if rows == "constant":  # a prefix of each document, which sees nothing else
        start = layout.document_start - layout.active_document_start
        return Sequences(start, key_start, longest, longest, start[1:] - start[:-1])
    num_keys = layout.document_num_keys if layout.is_cached else None
    if rows == "active":
        return Sequences(layout.active_document_start, key_start, layout.longest_active, longest, num_keys)
    most = layout.longest_active if layout.is_cached else longest
    return Sequences(layout.document_start, key_start, most, longest, num_keys)


def _part_row(layout: TokenLayout, rows: QueryRows) -> Tensor:
    """The queries `rows` of each part, by their place among `rows`."""
    if rows == "constant":
        return layout.constant_part_row
    return layout.active_part_row if rows == "active" else layout.part_row


def _parts(layout: TokenLayout, rows: QueryRows) -> Sequences:
    """The same of the parts of a layout with hidden spans, for queries in the order of `_part_row`."""
    key_start, longest = layout.part_key_start, layout.longest_document
    if rows == "constant":  # they see constant rows, the first of each part
        start = layout.part_start - layout.active_part_start
        return Sequences(start, key_start, longest, longest, layout.constant_part_num_keys)
    if rows == "active":
        return Sequences(layout.active_part_start, key_start, layout.longest_active, longest)
    return Sequences(layout.part_start, key_start, longest, longest)


def _triangles(layout: TokenLayout, rows: QueryRows) -> tuple[Tensor, Tensor]:
    """Rows of q and rows of k that the triangles are made of."""
    query_row = layout.active_triangle_row if rows == "active" else layout.triangle_row
    key_row = layout.triangle_row
    if layout.is_cached:
        key_row = layout.key_slot.index_select(0, key_row)
    return query_row, key_row + 1


def _triangles_of(layout: TokenLayout) -> Sequences:
    start, longest = layout.triangle_start, layout.longest_triangle
    return Sequences(start, start, longest, longest)


def _select(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.index_select(0, index) for x in tensors)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention to two disjoint sets of keys from the attention to each. out [n, H, D], lse [H, n]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((part - lse).exp().t()[..., None] for part in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse

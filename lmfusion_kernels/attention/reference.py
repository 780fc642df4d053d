"""Hybrid attention in plain PyTorch from the ranges of the keys: the kernel "reference", and gradients by autograd.

It holds an [H, Nq, Nk] tensor, so it is for small inputs and for dtypes that no other kernel takes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lmfusion_kernels.attention.interface import AttentionCall, AttentionProblem, Gradients

Forward = Callable[[AttentionCall], tuple[Tensor, Tensor]]


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
    visible_end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [Nq, H, D] in q's dtype and lse [H, Nq], both computed in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))
    key = torch.arange(k.shape[0], device=k.device)
    visible = (key >= key_start[:, None]) & (key < key_end[:, None])
    if visible_end is not None:
        visible &= torch.arange(q.shape[0], device=q.device)[:, None] < visible_end
    scores = (torch.einsum("nhd,mhd->hnm", q.to(wide), k) * scale).masked_fill(~visible, float("-inf"))
    # Not exp(scores - lse): at huge scores, adding the logarithm of the sum to the maximum rounds it away.
    sees_nothing = (scores == float("-inf")).all(dim=-1, keepdim=True)  # the softmax of such a row would be NaN
    weights = scores.masked_fill(sees_nothing, 0.0).softmax(dim=-1).masked_fill(sees_nothing, 0.0)
    return torch.einsum("hnm,mhd->nhd", weights, v).to(q.dtype), scores.logsumexp(dim=-1)


def store_rows(out: Tensor, out_row: Tensor | None) -> Tensor:
    """Row i of `out` moved to row out_row[i], a permutation."""
    return out if out_row is None else torch.empty_like(out).index_copy_(0, out_row.long(), out)


def recomputed_backward(forward: Forward, call: AttentionCall, dout: Tensor) -> Gradients:
    """The gradients of a forward that autograd can follow, which runs once more."""
    keys, _, _ = call.query_ranges()
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
        q, k, v = leaves
        out, _ = forward(call._replace(q=q, k=k, v=v))
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return (dq, dk, dv) if call.queries == "all" else (dq, dk.index_select(0, keys), dv.index_select(0, keys))


class Reference:
    """Plain PyTorch: every device, dtype and head size, time and memory proportional to queries times keys."""

    summary = "plain PyTorch"
    is_differentiable = True

    def unavailable_reason(self, device: torch.device) -> str:
        return ""

    def unsupported_reason(self, problem: AttentionProblem) -> str:
        return ""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        key_start, key_end, out_row = call.key_ranges()
        visible_end, _ = call.hidden_ends()
        out, lse = dense_attention(call.q, call.k, call.v, key_start, key_end, call.scale, visible_end)
        return store_rows(out, out_row), lse

    def backward(self, call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        return recomputed_backward(self.forward, call, dout)

"""Softmax attention over all tokens: causal text, bidirectional images, separate documents, hidden spans.

A hidden span is seen only from within. Time is proportional to the visible (query, key) pairs, memory to the tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lmfusion_kernels import reference
from lmfusion_kernels.attention import dispatch
from lmfusion_kernels.attention.interface import AttentionCall, Gradients, ranges_by_key
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.runtime import library
from lmfusion_kernels.runtime.backends import REFERENCE_RUNS, requested_backend
from lmfusion_kernels.runtime.transforms import INSIDE_TRANSFORM, is_transformed, refuse_forward_mode

_ops = torch.ops.lmfusion


def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Attention under the hybrid mask of `layout`: query `i` sees the keys `[key_start[i], key_end[i])`, except
    keys of other hidden spans.

    q: [N, H, D]. k, v: [layout.num_keys, H_kv, D]. All three are in sequence order, of one dtype and on the layout's
    device. H is a multiple of H_kv: query head h reads key-value head h // (H / H_kv). scale multiplies the scores;
    default D ** -0.5. Arithmetic is float32, or wider if the inputs are. Returns [N, H, D] of q's dtype.

    With a cached layout k and v are the whole cache, including slots that hold no token yet. It has no backward.

    backend: None for the kernel that is best here, "native" for any but the reference, or the name of a kernel:
    "triton", "flash", "flash-attn-2", "flash-attn-3", "flash-attn-4", "flex" or "reference" (lmfusion_kernels.attention
    describes them, `backends()` says which are available). Only the reference has a second derivative.

    Raises ValueError if shapes, dtypes or devices do not fit, if H is not a multiple of H_kv, if a gradient would be
    needed through a cached layout, or if `backend` cannot run.
    """
    _check(q, k, v, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    kernel = dispatch.choose_kernel(
        backend,
        layout,
        device=q.device,
        dtype=q.dtype,
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        needs_grad=needs_grad,
    )
    if kernel != "reference":
        refuse_forward_mode((q, k, v))
        if is_transformed((q, k, v)):
            if requested_backend(backend) is not None:
                raise ValueError(f"{kernel} attention was asked for, but {INSIDE_TRANSFORM}; {REFERENCE_RUNS}")
            kernel = "reference"
    if kernel == "reference":
        return reference.hybrid_attention(q, k, v, layout, scale)
    if needs_grad and not dispatch.KERNELS[kernel].is_differentiable:
        return _HybridAttention.apply(q, k, v, layout, kernel, scale)
    return dispatch.forward(kernel, AttentionCall(q, k, v, layout, "all", scale))[0]


class _HybridAttention(torch.autograd.Function):
    """Attention by a kernel that autograd cannot follow."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, kernel: str, scale: float) -> Tensor:
        out, lse = dispatch.forward(kernel, AttentionCall(q, k, v, layout, "all", scale))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.kernel, ctx.scale = layout, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = _HybridAttentionBackward.apply(dout, *ctx.saved_tensors, ctx.layout, ctx.kernel, ctx.scale)
        _, want_k, want_v, *_ = ctx.needs_input_grad
        return dq, dk if want_k else None, dv if want_v else None, None, None, None


class _HybridAttentionBackward(torch.autograd.Function):
    """The gradients. They have no gradients themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: TokenLayout,
        kernel: str,
        scale: float,
    ) -> Gradients:
        ctx.kernel = kernel
        return dispatch.backward(kernel, AttentionCall(q, k, v, layout, "all", scale), dout, out, lse)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.kernel} attention has no second derivative; backend='reference' has")


def _check(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            "q must be [N, H, D], k and v both [num_keys, H_kv, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them first")
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the heads of q must be a multiple of the {k.shape[1]} heads of k and v, got {q.shape[1]}; each key-value "
            "head serves the same number of query heads"
        )
    layout.check_rows(q, name="q")
    layout.check_rows(k, layout.num_keys, "k")
    layout.check_rows(v, layout.num_keys, "v")
    if layout.is_cached and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "a layout with cached_lengths has no backward, and q, k or v requires a gradient; "
            "run under torch.no_grad(), or build the layout without a cache"
        )


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    out_row: Tensor | None,
    scale: float,
    visible_end: Tensor | None = None,
    run_end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    num_queries, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((num_heads, num_queries), dtype=torch.float32)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    grad_key: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    out_row: Tensor | None,
    scale: float,
    visible_end: Tensor | None = None,
    run_end: Tensor | None = None,
) -> Gradients:
    grad_shape = (grad_key.shape[0], *k.shape[1:])
    return q.new_empty(q.shape), k.new_empty(grad_shape), v.new_empty(grad_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_start, key_end, out_row, ctx.scale, visible_end, run_end = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, key_start, key_end, out_row, visible_end, run_end)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, key_start, key_end, out_row, visible_end, run_end = ctx.saved_tensors
    _, want_k, want_v, *_ = ctx.needs_input_grad
    num_grad_keys = k.shape[0] if want_k or want_v else 0
    grad_key = torch.arange(num_grad_keys, dtype=torch.int32, device=q.device)
    query_start, query_end = ranges_by_key(key_start, key_end, num_grad_keys, visible_end)
    hidden = visible_end, run_end
    dq, dk, dv = _ops.hybrid_attention_backward(
        dout, q, k, v, out, lse, key_start, key_end, grad_key, query_start, query_end, out_row, ctx.scale, *hidden
    )
    return dq, dk if want_k else None, dv if want_v else None, *(None,) * 6


def visible_area(start: Tensor, end: Tensor, num_others: int, visible_end: Tensor | None = None) -> int:
    """The number of (query, key) pairs within ranges [start, end) among `num_others` tokens of the other kind.

    visible_end: given if the ranges are keys by query; hidden pairs then do not count. For fake and meta tensors, which
    hold no numbers: all pairs.
    """
    if type(start) is not Tensor or start.device.type == "meta":
        return start.shape[0] * num_others
    if visible_end is not None:
        start, end = ranges_by_key(start, end, num_others, visible_end)
    return int((end.long() - start.long()).sum())


def _flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    out_row: Tensor | None,
    scale: float,
    visible_end: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> int:
    """Two products, scores and weighted values, over the visible pairs."""
    num_heads, head_dim = q.shape[1:]
    return 2 * 2 * num_heads * head_dim * visible_area(key_start, key_end, k.shape[0], visible_end)


def _backward_flops(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    grad_key: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    out_row: Tensor | None,
    scale: float,
    visible_end: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> int:
    """Three products (scores again, gradients of the weights, dq) over the visible pairs; dk and dv over those of the
    listed keys."""
    num_queries, num_heads, head_dim = q.shape
    pairs = visible_area(key_start, key_end, k.shape[0], visible_end)
    grad_pairs = visible_area(query_start, query_end, num_queries)
    return 2 * num_heads * head_dim * (3 * pairs + 2 * grad_pairs)


if library.native:
    torch.library.register_fake("lmfusion::hybrid_attention", _fake)
    torch.library.register_fake("lmfusion::hybrid_attention_backward", _fake_backward)
    torch.library.register_autograd("lmfusion::hybrid_attention", _backward, setup_context=_setup_context)
    library.refuse_second_derivative("hybrid_attention_backward")
    # torch.utils.flop_counter.FlopCounterMode counts visible pairs; with fake tensors, all pairs.
    register_flop_formula(_ops.hybrid_attention, get_raw=True)(_flops)
    register_flop_formula(_ops.hybrid_attention_backward, get_raw=True)(_backward_flops)

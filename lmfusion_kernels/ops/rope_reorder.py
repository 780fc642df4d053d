"""RoPE, and the rows of both towers moved to sequence order: public wrapper, shapes under tracing, autograd."""

from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels import reference
from lmfusion_kernels.block.weights import Rope, TowerRows
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.runtime import library
from lmfusion_kernels.runtime.backends import choose_backend
from lmfusion_kernels.runtime.validation import check_rope, check_rows, check_weight

_ops = torch.ops.lmfusion


def rope_reorder(
    qkv: TowerRows,
    layout: TokenLayout,
    rope: Rope,
    num_heads: int,
    text_q_norm: Tensor | None = None,
    text_k_norm: Tensor | None = None,
    image_q_norm: Tensor | None = None,
    image_k_norm: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of both towers from tower order to sequence order, with RoPE on q and k.

    qkv: [N, (H + 2 H_kv) D] in tower order (heads of q, then k, then v), or the pair ([num_text, ..], [num_image, ..]).
    rope: cos, sin from `rope_tables`, float32 [N, D/2] in sequence order; they get no gradient. The optional norm
    weights [D], in the dtype of qkv, are applied to every query or key head before the rotation (Qwen3), with `eps`.
    backend: None (choose), "native" or "reference".

    Returns q [N, H, D], k and v [N, H_kv, D]. Raises ValueError for shapes, dtypes or devices that do not match.
    """
    rows = check_rows(qkv, layout, "qkv")
    cos, sin = rope
    norms = (text_q_norm, text_k_norm, image_q_norm, image_k_norm)
    _check(rows, layout, cos, sin, num_heads, norms)
    if choose_backend(backend, rows[0], others=(*rows, cos, sin, *norms)) == "reference":
        return reference.rope_reorder(qkv, layout, rope, num_heads, *norms, eps)
    order = layout.tower_to_sequence
    _, q, k, v = _ops.rope_reorder(rows, cos, sin, order, order, layout.num_text, 0, num_heads, *norms, eps)
    return q, k, v


def _check(
    rows: list[Tensor],
    layout: TokenLayout,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    norms: tuple[Tensor | None, ...],
) -> None:
    check_rope(cos, sin, layout, rows[0])
    head_dim = 2 * cos.shape[1]
    for tensor in rows:
        num_kv_rows = tensor.shape[1] - num_heads * head_dim
        if tensor.shape[1] != rows[0].shape[1] or num_heads <= 0 or num_kv_rows <= 0 or num_kv_rows % (2 * head_dim):
            raise ValueError(
                f"qkv must be (H + 2 H_kv) D wide with H = {num_heads} query heads and D = {head_dim}, equal in both "
                f"towers, got {tensor.shape[1]}"
            )
    for name, norm in zip(("text_q_norm", "text_k_norm", "image_q_norm", "image_k_norm"), norms, strict=True):
        check_weight(norm, (head_dim,), rows[0], name)


def _fake(
    qkv: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    tower_to_sequence: Tensor,
    query_row: Tensor,
    num_text: int,
    num_constant: int,
    num_heads: int,
    text_q_norm: Tensor | None,
    text_k_norm: Tensor | None,
    image_q_norm: Tensor | None,
    image_k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, head_dim = cos.shape[0], 2 * cos.shape[1]
    num_kv_heads = (qkv[0].shape[1] // head_dim - num_heads) // 2
    new = qkv[0].new_empty
    return (
        new(num_constant, num_heads, head_dim),
        new(num_rows - num_constant, num_heads, head_dim),
        new(num_rows, num_kv_heads, head_dim),
        new(num_rows, num_kv_heads, head_dim),
    )


def _fake_cached(
    qkv: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    tower_to_sequence: Tensor,
    key_slot: Tensor,
    num_text: int,
    num_heads: int,
    text_q_norm: Tensor | None,
    text_k_norm: Tensor | None,
    image_q_norm: Tensor | None,
    image_k_norm: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    return qkv[0].new_empty(cos.shape[0], num_heads, 2 * cos.shape[1])


def _fake_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    active_row: Tensor,
    active_key: Tensor | None,
    num_live: int,
    num_heads: int,
    text_q_norm: Tensor | None,
    text_k_norm: Tensor | None,
    image_q_norm: Tensor | None,
    image_k_norm: Tensor | None,
    eps: float,
    text_norm_grad: bool,
    image_norm_grad: bool,
    joined: bool = False,
) -> list[Tensor]:
    num_rows, num_heads, head_dim = dq.shape
    width = (num_heads + 2 * dk.shape[1]) * head_dim
    counts = [num_rows] if joined else [num_live, num_rows - num_live]
    wanted = ((text_norm_grad, text_q_norm, text_k_norm), (image_norm_grad, image_q_norm, image_k_norm))
    norms = [norm for want, *tower in wanted for norm in tower if want and norm is not None]
    return [dq.new_empty(count, width) for count in counts] + [norm.new_empty(head_dim) for norm in norms]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, cos, sin, order, query_row, ctx.num_text, ctx.num_constant, ctx.num_heads, *norms, ctx.eps = inputs
    has_norms = any(norm is not None for norm in norms)
    ctx.save_for_backward(cos, sin, order, query_row, *norms, *(qkv if has_norms else ()))
    ctx.num_tensors = len(qkv)


def _backward(ctx: Any, dq_constant: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    cos, sin, order, query_row, *norms = ctx.saved_tensors
    norms, qkv = norms[:4], norms[4:]
    rank = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
    row = torch.empty_like(order).scatter_(0, order.long(), rank)  # the inverse: by sequence index, row in tower order
    if ctx.num_constant:
        dq = torch.cat([dq_constant, dq]).index_select(0, query_row.index_select(0, row))
    needs = ctx.needs_input_grad[8:12]
    want_text, want_image = any(needs[:2]), any(needs[2:])
    grads = _ops.rope_reorder_backward(
        dq, dk, dv, qkv, cos, sin, row, None, ctx.num_text, ctx.num_heads, *norms, ctx.eps, want_text, want_image,
        ctx.num_tensors == 1,
    )  # fmt: skip
    dqkv, norm_grads = grads[: ctx.num_tensors], list(grads[ctx.num_tensors :])
    wants = (want_text, want_text, want_image, want_image)
    dnorms = [norm_grads.pop(0) if want and norm is not None else None for want, norm in zip(wants, norms, strict=True)]
    return dqkv, None, None, None, None, None, None, None, *dnorms, None


if library.native:
    torch.library.register_fake("lmfusion::rope_reorder", _fake)
    torch.library.register_fake("lmfusion::rope_reorder_cached", _fake_cached)
    torch.library.register_fake("lmfusion::rope_reorder_backward", _fake_backward)
    torch.library.register_autograd("lmfusion::rope_reorder", _backward, setup_context=_setup_context)
    library.refuse_second_derivative("rope_reorder_backward")

"""One two-tower decoder layer as one autograd node, with a hand-written backward that follows the three row classes.

Saved for the backward, in elements per token (d: width of the row's tower, I: its FFN width):

    constant rows      2 H_kv D                       their keys and values
    live, image rows   2 d + 2 H D + 2 H_kv D + 2 I   input, middle of the residual stream, query, attention output,
                                                      key, value, gate, up; with QK norm another (H + 2 H_kv) D
    every such row     H + 2 in float32               log-sum-exp, two reciprocal root mean squares

Norm outputs and the SwiGLU product are recomputed by the backward kernels on their way. Given one tensor for both
towers, the node keeps that tensor (the caller's) instead of the image part of it.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmfusion_kernels import reference
from lmfusion_kernels.backends import choose
from lmfusion_kernels.checks import check_rope, check_weight
from lmfusion_kernels.layout import TokenLayout
from lmfusion_kernels.weights import BlockWeights, Rope, Rows, split_towers

_ops = torch.ops.lmfusion
_WEIGHT_NAMES = tuple(field.name for field in fields(BlockWeights) if field.name != "eps")


def routed_block(
    x: Rows,
    layout: TokenLayout,
    text: BlockWeights,
    image: BlockWeights,
    rope: Rope,
    order: str = "tower",
    backend: str | None = None,
    kv_cache: tuple[Tensor, Tensor] | None = None,
) -> Rows:
    """One decoder layer of two towers with shared attention (LMFusion, equations 7-12, with Llama's residuals).

    x: [N, d] in tower order, or the pair ([num_text, d_text], [num_image, d_image]); with `order="sequence"` [N, d] in
    sequence order, to put the block into a model that knows nothing of towers. The result has the form of `x`.
    text, image: weights in the dtype of `x`. rope: cos, sin from `rope_tables`. backend: None (choose), "native" or
    "reference". kv_cache: with a cached layout, the key and value buffers [num_keys, H_kv, D], started from zeros and
    written in place; for inference only. torch.autocast has no effect: rows and weights in bfloat16 are computed in
    bfloat16.

    Weights that do not require a gradient get none, and constant rows of the layout take no part in the backward: the
    gradient of `x` is zero there. Raises ValueError for mismatched shapes, dtypes or devices, and for a layout with
    constant rows beside trainable text weights.
    """
    if order not in ("tower", "sequence"):
        raise ValueError(f"order is {order!r}; it is 'tower' or 'sequence'")
    if order == "sequence":
        if not isinstance(x, Tensor):
            raise ValueError("order='sequence' takes one tensor; rows of two widths have no common sequence order")
        y = routed_block(layout.to_tower_order(x), layout, text, image, rope, "tower", backend, kv_cache)
        assert isinstance(y, Tensor)
        return layout.to_sequence_order(y)
    x_text, x_image = split_towers(x, layout)
    _check(x_text, x_image, layout, text, image, rope, kv_cache)
    with torch.autocast(x_text.device.type, enabled=False):
        if choose(backend, x_text, x_image) == "reference":
            return reference.routed_block(x, layout, text, image, rope, "tower", kv_cache)
        if kv_cache is not None or not torch.is_grad_enabled():
            return _forward(x, layout, (text, image), rope, kv_cache, keep=False)[0]
        weights = (getattr(tower, name) for tower in (text, image) for name in _WEIGHT_NAMES)
        rows = (x, None, None) if isinstance(x, Tensor) else (None, *x)
        y_text, y_image = _RoutedBlock.apply(*rows, *weights, *rope, layout, text.eps)
        return y_text if isinstance(x, Tensor) else (y_text, y_image)


def _check(
    x_text: Tensor,
    x_image: Tensor,
    layout: TokenLayout,
    text: BlockWeights,
    image: BlockWeights,
    rope: Rope,
    kv_cache: tuple[Tensor, Tensor] | None,
) -> None:
    check_rope(*rope, layout, x_text)
    head_dim = 2 * rope[0].shape[-1]
    qkv_width, out_width = text.qkv_proj.shape[0], text.o_proj.shape[-1]
    num_kv_rows = qkv_width - out_width
    if out_width % head_dim or num_kv_rows <= 0 or num_kv_rows % (2 * head_dim) or 2 * out_width % num_kv_rows:
        raise ValueError(
            f"text.o_proj {tuple(text.o_proj.shape)} and text.qkv_proj {tuple(text.qkv_proj.shape)} do not divide into "
            f"H query and 2 H_kv key and value heads of {head_dim}, rope's size, with H a multiple of H_kv"
        )
    if image.qkv_proj.shape[0] != qkv_width or image.o_proj.shape[-1] != out_width:
        raise ValueError(
            "the towers share their attention, so they need equally many heads; qkv_proj has "
            f"{qkv_width} rows in the text tower and {image.qkv_proj.shape[0]} in the image tower"
        )
    if text.eps != image.eps:
        raise ValueError(
            f"eps is {text.eps} in the text tower and {image.eps} in the image tower; it must be one number"
        )
    for name, x, weights in (("text", x_text, text), ("image", x_image, image)):
        if x.dim() != 2:
            raise ValueError(f"{name} rows have shape {tuple(x.shape)}; they are [rows, width]")
        width, intermediate = x.shape[1], weights.down_proj.shape[-1]
        shapes = {
            "input_layernorm": (width,),
            "qkv_proj": (qkv_width, width),
            "o_proj": (width, out_width),
            "post_attention_layernorm": (width,),
            "gate_up_proj": (2 * intermediate, width),
            "down_proj": (width, intermediate),
            "qkv_bias": (qkv_width,),
            "q_norm": (head_dim,),
            "k_norm": (head_dim,),
        }
        for weight_name, shape in shapes.items():
            check_weight(getattr(weights, weight_name), shape, x, f"{name}.{weight_name}")
    if layout.is_cached != (kv_cache is not None):
        raise ValueError("a layout with cached_lengths needs kv_cache, and kv_cache needs such a layout")
    if kv_cache is not None:
        shape = (layout.num_keys, num_kv_rows // (2 * head_dim), head_dim)
        for name, cache in zip(("keys", "values"), kv_cache, strict=True):
            check_weight(cache, shape, x_text, f"kv_cache {name}")
        tensors = (x_text, x_image, *(getattr(w, n) for w in (text, image) for n in _WEIGHT_NAMES))
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            raise ValueError(
                "a block with kv_cache has no backward, and an input requires a gradient; use torch.no_grad()"
            )
    if layout.num_constant and torch.is_grad_enabled():
        trainable = [n for n in _WEIGHT_NAMES if (w := getattr(text, n)) is not None and w.requires_grad]
        if trainable:
            raise ValueError(
                f"text.{trainable[0]} requires a gradient, but the layout takes the text tower for frozen; build it "
                "with frozen_text=False, or call requires_grad_(False) on the text weights"
            )


def _named(tensors: Sequence[Tensor | None], eps: float) -> BlockWeights:
    values: dict[str, Any] = dict(zip(_WEIGHT_NAMES, tensors, strict=True))
    return BlockWeights(**values, eps=eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _forward(
    x: Rows,
    layout: TokenLayout,
    weights: tuple[BlockWeights, BlockWeights],
    rope: Rope,
    kv_cache: tuple[Tensor, Tensor] | None,
    keep: bool,
) -> tuple[Rows, tuple[Tensor, ...]]:
    """The output in the form of `x`, and what the backward reads if it is to be kept."""
    text, image = weights
    xs = split_towers(x, layout)
    num_constant, num_live = layout.num_constant, layout.num_live
    *normed, rstd_in = _ops.rms_norm(
        list(xs), [], text.input_layernorm, image.input_layernorm, layout.num_text, text.eps
    )
    qkv = [_linear(rows, w.qkv_proj, w.qkv_bias) for rows, w in zip(normed, weights, strict=True)]
    q_constant, q, k, v = _ops.rope_reorder(
        qkv,
        *rope,
        layout.tower_to_sequence,
        layout.query_row,
        layout.num_text,
        num_constant,
        text.num_heads(rope),
        text.q_norm,
        text.k_norm,
        image.q_norm,
        image.k_norm,
        text.eps,
    )
    scale = q.shape[-1] ** -0.5
    if kv_cache is not None:
        for cache, new in zip(kv_cache, (k, v), strict=True):
            cache.index_copy_(0, layout.key_slot.long(), new)
        k, v = kv_cache
    out, lse = _ops.hybrid_attention(q, k, v, layout.active_key_start, layout.active_key_end, layout.active_row, scale)
    attended = [rows.flatten(1) for rows in out.tensor_split([num_live])]
    if num_constant:
        out_constant, _ = _ops.hybrid_attention(
            q_constant, k, v, layout.constant_key_start, layout.constant_key_end, None, scale
        )
        attended[0] = torch.cat([out_constant.flatten(1), attended[0]])
    middle = [torch.addmm(rows, a, w.o_proj.t()) for rows, a, w in zip(xs, attended, weights, strict=True)]
    *normed, rstd_middle = _ops.rms_norm(
        middle, [], text.post_attention_layernorm, image.post_attention_layernorm, layout.num_text, text.eps
    )
    gate_up = [_linear(rows, w.gate_up_proj) for rows, w in zip(normed, weights, strict=True)]
    fed = zip(middle, _ops.swiglu(gate_up), weights, strict=True)
    y: Rows
    if isinstance(x, Tensor):
        y = torch.empty_like(x)
        for rows, (m, h, w) in zip(split_towers(y, layout), fed, strict=True):
            torch.addmm(m, h, w.down_proj.t(), out=rows)
    else:
        y_text, y_image = (torch.addmm(m, h, w.down_proj.t()) for m, h, w in fed)
        y = (y_text, y_image)

    if not keep:
        return y, ()

    def active(rows: Tensor) -> Tensor:
        """The rows that are not constant, without keeping the constant ones alive."""
        return rows[num_constant:].clone() if num_constant else rows

    saved = [active(xs[0]), xs[1], active(rstd_in), active(middle[0]), middle[1], active(rstd_middle)]
    saved += [q, k, v, out, lse, active(gate_up[0]), gate_up[1]]
    if any(norm is not None for w in weights for norm in (w.q_norm, w.k_norm)):
        saved += [active(qkv[0]), qkv[1]]
    return y, tuple(saved)


class _RoutedBlock(torch.autograd.Function):
    """Rows of both towers in, rows of both towers out; `x` has all rows, or `x_text` and `x_image` a tower's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor | None, x_text: Tensor | None, x_image: Tensor | None, *args: Any) -> Any:
        count = len(_WEIGHT_NAMES)
        *weights, cos, sin, layout, eps = args
        text, image = _named(weights[:count], eps), _named(weights[count:], eps)
        rows: Rows
        if x is None:
            assert x_text is not None and x_image is not None
            rows = (x_text, x_image)
        else:
            rows = x
        y, saved = _forward(rows, layout, (text, image), (cos, sin), None, keep=True)
        ctx.save_for_backward(*weights, cos, sin, *saved)
        ctx.layout, ctx.eps = layout, eps
        return (y, None) if isinstance(y, Tensor) else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> Any:
        with torch.autocast(ctx.layout.device.type, enabled=False):
            return _backward(ctx, dy)


def _backward(ctx: Any, dy: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    layout, needs = ctx.layout, ctx.needs_input_grad
    num_constant, num_live = layout.num_constant, layout.num_live
    count = len(_WEIGHT_NAMES)
    tensors = ctx.saved_tensors
    text, image = _named(tensors[:count], ctx.eps), _named(tensors[count : 2 * count], ctx.eps)
    weights = (text, image)
    cos, sin = tensors[2 * count : 2 * count + 2]
    x_live, x_image, rstd_in, middle_live, middle_image, rstd_middle, q, k, v, out, lse, *rest = tensors[
        2 * count + 2 :
    ]
    gate_up, qkv = rest[:2], rest[2:]
    wants = [
        dict(zip(_WEIGHT_NAMES, needs[3 + tower * count : 3 + (tower + 1) * count], strict=True)) for tower in (0, 1)
    ]
    grads: list[dict[str, Tensor]] = [{}, {}]
    is_single = needs[0] or dy[1] is None
    dy_text, dy_image = dy[0].tensor_split([layout.num_text]) if is_single else dy
    dys = [dy_text[num_constant:].contiguous(), dy_image.contiguous()]

    def weight_grads(name: str, dout: list[Tensor], rows: list[Tensor]) -> None:
        for want, grad, d, r in zip(wants, grads, dout, rows, strict=True):
            if want[name]:
                grad[name] = torch.mm(d.t(), r)

    def norm_backward(
        name: str, dnormed: list[Tensor], rows: list[Tensor], rstd: Tensor, dresidual: list[Tensor], recompute: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        want_text, want_image = wants[0][name], wants[1][name]
        results = iter(_ops.rms_norm_backward(
            dnormed, rows, rstd, getattr(text, name), getattr(image, name), num_live, dresidual,
            want_text, want_image, recompute,
        ))  # fmt: skip
        dx = [next(results), next(results)]
        for grad, want in zip(grads, (want_text, want_image), strict=True):
            if want:
                grad[name] = next(results)
        return dx, list(results)

    # Feed-forward network, from its end.
    dh = [torch.mm(d, w.down_proj) for d, w in zip(dys, weights, strict=True)]
    want_down = wants[0]["down_proj"] or wants[1]["down_proj"]
    dgate_live, dgate_image, *h = _ops.swiglu_backward(dh, list(gate_up), want_down)
    if want_down:
        weight_grads("down_proj", dys, h)
    dgate_up = [dgate_live, dgate_image]
    dnormed = [torch.mm(d, w.gate_up_proj) for d, w in zip(dgate_up, weights, strict=True)]
    want_gate_up = wants[0]["gate_up_proj"] or wants[1]["gate_up_proj"]
    dmiddle, normed = norm_backward(
        "post_attention_layernorm", dnormed, [middle_live, middle_image], rstd_middle, dys, want_gate_up
    )
    if want_gate_up:
        weight_grads("gate_up_proj", dgate_up, normed)

    # Attention: rows arrive in [live | image] order, gradients of q, k, v leave in sequence order.
    dout = torch.empty_like(out)
    for rows, d, w in zip(dout.flatten(1).tensor_split([num_live]), dmiddle, weights, strict=True):
        torch.mm(d, w.o_proj, out=rows)
    weight_grads("o_proj", dmiddle, list(out.flatten(1).tensor_split([num_live])))
    dq, dk, dv = _ops.hybrid_attention_backward(
        dout, q, k, v, out, lse, layout.active_key_start, layout.active_key_end, layout.active_key,
        layout.active_query_start, layout.active_query_end, layout.active_row, q.shape[-1] ** -0.5,
    )  # fmt: skip
    norm_wants = [wants[tower]["q_norm"] or wants[tower]["k_norm"] for tower in (0, 1)]
    results = iter(_ops.rope_reorder_backward(
        dq, dk, dv, list(qkv), cos, sin, layout.active_row, layout.active_key, num_live, q.shape[1],
        text.q_norm, text.k_norm, image.q_norm, image.k_norm, ctx.eps, *norm_wants,
    ))  # fmt: skip
    dqkv = [next(results), next(results)]
    for grad, want, w in zip(grads, norm_wants, weights, strict=True):
        for name in ("q_norm", "k_norm"):
            if want and getattr(w, name) is not None:
                grad[name] = next(results)

    # Projections and the first norm.
    for grad, want, d in zip(grads, wants, dqkv, strict=True):
        if want["qkv_bias"]:
            grad["qkv_bias"] = d.sum(0)
    dnormed = [torch.mm(d, w.qkv_proj) for d, w in zip(dqkv, weights, strict=True)]
    want_qkv = wants[0]["qkv_proj"] or wants[1]["qkv_proj"]
    dx, normed = norm_backward("input_layernorm", dnormed, [x_live, x_image], rstd_in, dmiddle, want_qkv)
    if want_qkv:
        weight_grads("qkv_proj", dqkv, normed)
    weight_results = (grad.get(name) if want[name] else None for grad, want in zip(grads, wants, strict=True)
                      for name in _WEIGHT_NAMES)  # fmt: skip
    return (*_input_grads(dx, needs, num_constant), *weight_results, None, None, None, None)


def _input_grads(dx: list[Tensor], needs: tuple[bool, ...], num_constant: int) -> tuple[Tensor | None, ...]:
    """Gradients of x, x_text and x_image from those of the live and the image rows; constant rows get zeros."""
    dx_live, dx_image = dx
    zeros = dx_live.new_zeros(num_constant, dx_live.shape[1])
    if needs[0]:
        return torch.cat([zeros, dx_live, dx_image]), None, None
    dx_text = (torch.cat([zeros, dx_live]) if num_constant else dx_live) if needs[1] else None
    return None, dx_text, dx_image if needs[2] else None

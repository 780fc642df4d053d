"""The backward of a two-tower layer, as one autograd node.

Outside attention it is 20 kernels on a GPU: two GEMMs for each of the four projections of each tower (one if the weight
is frozen), one kernel for SwiGLU, two for the norms, one for RoPE + reorder. Each trained norm adds one kernel, which
adds up partial sums; trained biases add one per tower; constant tokens add two if text rows need gradients (zeros, and
their concatenation); one tensor for both towers adds one. These kernels also recompute norm outputs and the SwiGLU
product, which the gradients of the following weights need. Rows are the active tokens throughout, [live | image].
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels.attention import dispatch
from lmfusion_kernels.attention.interface import AttentionCall
from lmfusion_kernels.block.forward import Activations, Call, complete, forward, present
from lmfusion_kernels.block.weights import BlockWeights, Rope, TowerRows
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.runtime.transforms import Link, NoSecondDerivative

WEIGHT_NAMES = tuple(field.name for field in fields(BlockWeights) if field.name != "eps")
_COUNT = len(WEIGHT_NAMES)

_ops: Any = torch.ops.lmfusion


def apply(call: Call, x: TowerRows) -> TowerRows:
    """The block on rows `x`, with a backward."""
    weights = [getattr(tower, name) for tower in call.towers for name in WEIGHT_NAMES]
    rows = (x, None, None) if isinstance(x, Tensor) else (None, *x)
    link = Link.apply(
        *(part for part in rows if part is not None)
    )  # lets NoSecondDerivative reach the rows, not all of which are kept
    kinds = (call.layout, call.text.eps, call.attention, call.ffn, call.recompute)
    y_text, y_image = _RoutedBlock.apply(*rows, *weights, *call.rope, link, *kinds)
    return y_text if isinstance(x, Tensor) else (y_text, y_image)


def _call(weights: tuple[Tensor | None, ...], rope: Rope, kinds: tuple[TokenLayout, float, str, str, str]) -> Call:
    layout, eps, *kernels_and_mode = kinds
    text: dict[str, Any] = dict(zip(WEIGHT_NAMES, weights[:_COUNT], strict=True))
    image: dict[str, Any] = dict(zip(WEIGHT_NAMES, weights[_COUNT:], strict=True))
    return Call(layout, BlockWeights(**text, eps=eps), BlockWeights(**image, eps=eps), rope, *kernels_and_mode)


class _RoutedBlock(torch.autograd.Function):
    """Rows of both towers in, rows of both towers out; `x` has all rows, or `x_text` and `x_image` one tower's each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor | None, x_text: Tensor | None, x_image: Tensor | None, *args: Any) -> Any:
        weights, (cos, sin, link, *kinds) = args[: 2 * _COUNT], args[2 * _COUNT :]
        rows: TowerRows
        if x is None:
            assert x_text is not None and x_image is not None
            rows = (x_text, x_image)
        else:
            rows = x
        y, saved = forward(_call(weights, (cos, sin), tuple(kinds)), rows, None, keep=True)
        assert saved is not None
        ctx.save_for_backward(*weights, cos, sin, *saved, link)
        ctx.kinds = tuple(kinds)
        return (y, None) if isinstance(y, Tensor) else y

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        device_type = ctx.kinds[0].device.type
        tensors = ctx.saved_tensors  # read once: saved-tensor hooks unpack all of them on every access
        weights, (cos, sin) = tensors[: 2 * _COUNT], tensors[2 * _COUNT : 2 * _COUNT + 2]
        with torch.autocast("cpu" if device_type == "meta" else device_type, enabled=False), torch.no_grad():
            saved = Activations(*tensors[2 * _COUNT + 2 : -1])
            call = _call(weights, (cos, sin), ctx.kinds)
            if call.recompute != "none":
                saved = complete(call, saved)
            needs = ctx.needs_input_grad
            grads = (*backward(call, saved, dy, needs[:3], needs[3 : 3 + 2 * _COUNT]), *[None] * 8)
        if not torch.is_grad_enabled():
            return grads
        return NoSecondDerivative.apply("routed_block", len(grads), *grads, *dy, *weights, tensors[-1])


def backward(
    call: Call,
    saved: Activations,
    dy: Sequence[Tensor | None],
    needs_rows: Sequence[bool],
    needs_weights: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, x_text and x_image, then those of the weights of both towers; None where not needed."""
    layout, text, image = call.layout, call.text, call.image
    num_constant, num_live = layout.num_constant, layout.num_live
    wants = [dict(zip(WEIGHT_NAMES, part, strict=True)) for part in (needs_weights[:_COUNT], needs_weights[_COUNT:])]
    grads: list[dict[str, Tensor]] = [{}, {}]
    first, second = present(dy[0]), dy[1]
    dy_text, dy_image = first.tensor_split([layout.num_text]) if second is None else (first, second)
    dys = [dy_text[num_constant:].contiguous(), dy_image.contiguous()]

    def weight_grads(name: str, dout: list[Tensor], rows: list[Tensor]) -> None:
        for want, grad, d, r in zip(wants, grads, dout, rows, strict=True):
            if want[name]:
                grad[name] = torch.mm(d.t(), r)

    def norm_backward(
        name: str, dnormed: list[Tensor], rows: list[Tensor], rstd: Tensor, dresidual: list[Tensor], recompute: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        want_text, want_image = wants[0][name], wants[1][name]
        rstd = rstd[rstd.shape[0] - layout.num_active :]  # constant tokens come first, if it has them
        results = iter(_ops.rms_norm_backward(
            dnormed, rows, rstd, getattr(text, name), getattr(image, name), num_live, dresidual, want_text, want_image,
            recompute,
        ))  # fmt: skip
        dx = [next(results), next(results)]
        for grad, want in zip(grads, (want_text, want_image), strict=True):
            if want:
                grad[name] = next(results)
        return dx, list(results)

    # Feed-forward network, from its end.
    towers = (text, image)
    dh = [torch.mm(d, w.down_proj) for d, w in zip(dys, towers, strict=True)]
    want_down = wants[0]["down_proj"] or wants[1]["down_proj"]
    dgate_live, dgate_image, *h = _ops.swiglu_backward(dh, [saved.gate_up_live, saved.gate_up_image], want_down)
    if want_down:
        weight_grads("down_proj", dys, h)
    dgate_up = [dgate_live, dgate_image]
    dnormed = [torch.mm(d, w.gate_up_proj) for d, w in zip(dgate_up, towers, strict=True)]
    want_gate_up = wants[0]["gate_up_proj"] or wants[1]["gate_up_proj"]
    post_attention = [present(saved.post_attention_live), present(saved.post_attention_image)]
    rstd = present(saved.rstd_post_attention)
    dpost_attention, normed = norm_backward(
        "post_attention_layernorm", dnormed, post_attention, rstd, dys, want_gate_up
    )
    if want_gate_up:
        weight_grads("gate_up_proj", dgate_up, normed)

    # Attention: rows arrive in [live | image] order; the gradients of q, k, v leave in sequence order.
    q, k, v, out, lse = map(present, (saved.q, saved.k, saved.v, saved.out, saved.lse))
    dout = torch.empty_like(out)
    for rows, d, w in zip(dout.flatten(1).tensor_split([num_live]), dpost_attention, towers, strict=True):
        torch.mm(d, w.o_proj, out=rows)
    weight_grads("o_proj", dpost_attention, list(out.flatten(1).tensor_split([num_live])))
    active = AttentionCall(q, k, v, layout, "active", call.scale)
    dqkv_rows = dispatch.backward(call.attention, active, dout, out, lse)
    norm_wants = [want["q_norm"] or want["k_norm"] for want in wants]
    qkv = [saved.qkv_live, saved.qkv_image] if call.has_qk_norm else []
    results = iter(_ops.rope_reorder_backward(
        *dqkv_rows, qkv, *call.rope, layout.active.out_row, layout.active.key, num_live, call.num_heads, *call.qk_norms,
        text.eps, *norm_wants,
    ))  # fmt: skip
    dqkv = [next(results), next(results)]
    for grad, want, wanted, w in zip(grads, norm_wants, wants, towers, strict=True):
        for name in ("q_norm", "k_norm"):
            if want and getattr(w, name) is not None:
                dnorm = next(results)
                if wanted[name]:
                    grad[name] = dnorm

    # Projections and the first norm.
    for grad, wanted, d in zip(grads, wants, dqkv, strict=True):
        if wanted["qkv_bias"]:
            grad["qkv_bias"] = d.sum(0)
    dnormed = [torch.mm(d, w.qkv_proj) for d, w in zip(dqkv, towers, strict=True)]
    want_qkv = wants[0]["qkv_proj"] or wants[1]["qkv_proj"]
    x, rstd = [saved.x_live, saved.x_image], present(saved.rstd_in)
    dx, normed = norm_backward("input_layernorm", dnormed, x, rstd, dpost_attention, want_qkv)
    if want_qkv:
        weight_grads("qkv_proj", dqkv, normed)
    weight_results = (grad.get(name) for grad in grads for name in WEIGHT_NAMES)
    return (*_input_grads(dx, needs_rows, num_constant), *weight_results)


def _input_grads(dx: list[Tensor], needs: Sequence[bool], num_constant: int) -> tuple[Tensor | None, ...]:
    """Gradients of x, x_text and x_image from those of the live and the image rows; constant tokens get zeros."""
    dx_live, dx_image = dx
    zeros = [dx_live.new_zeros(num_constant, dx_live.shape[1])] if num_constant and (needs[0] or needs[1]) else []
    if needs[0]:
        return torch.cat([*zeros, dx_live, dx_image]), None, None
    dx_text = (torch.cat([*zeros, dx_live]) if num_constant else dx_live) if needs[1] else None
    return None, dx_text, dx_image if needs[2] else None

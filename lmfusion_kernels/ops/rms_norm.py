"""RMSNorm of rows of two towers, each with its tower's weight: public wrapper, shapes under tracing, autograd."""

from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels import reference
from lmfusion_kernels.block.weights import TowerRows
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.runtime import library
from lmfusion_kernels.runtime.backends import choose_backend
from lmfusion_kernels.runtime.validation import check_like, check_rows, check_weight

_ops = torch.ops.lmfusion


def routed_rms_norm(
    x: TowerRows,
    text_weight: Tensor,
    image_weight: Tensor,
    layout: TokenLayout,
    eps: float,
    residual: TowerRows | None = None,
    backend: str | None = None,
) -> TowerRows | tuple[TowerRows, TowerRows]:
    """x / rms(x) * weight, row by row, text rows with `text_weight` and image rows with `image_weight`.

    x: [N, d] in tower order, or the pair ([num_text, d_text], [num_image, d_image]). text_weight [d_text], image_weight
    [d_image], in the dtype of x. With `residual`, held like x, normalises x + residual and returns
    (normed, x + residual). backend: None (choose), "native" or "reference". Results have the form of x.

    Sums are float32 for bfloat16 rows. A weight that requires no gradient gets none.
    Raises ValueError for shapes, dtypes or devices that do not match.
    """
    rows = check_rows(x, layout)
    check_weight(text_weight, (rows[0].shape[1],), rows[0], "text_weight")
    check_weight(image_weight, (rows[-1].shape[1],), rows[-1], "image_weight")
    added = [] if residual is None else check_rows(residual, layout, "residual")
    if added:
        check_like(added, rows, "residual")
    if choose_backend(backend, rows[0], others=(*rows, *added, text_weight, image_weight)) == "reference":
        return reference.routed_rms_norm(x, text_weight, image_weight, layout, eps, residual)
    if residual is None:
        out = _ops.rms_norm_alone(rows, text_weight, image_weight, layout.num_text, eps)
        return out[0] if isinstance(x, Tensor) else (out[0], out[1])
    out = _ops.rms_norm(rows, added, text_weight, image_weight, layout.num_text, eps)
    return (out[0], out[1]) if isinstance(x, Tensor) else ((out[0], out[1]), (out[2], out[3]))


def _fake(
    x: list[Tensor],
    residual: list[Tensor],
    text_weight: Tensor,
    image_weight: Tensor,
    num_text: int,
    eps: float,
    num_constant: int = 0,
    keep_text: bool = False,
    keep_image: bool = False,
) -> list[Tensor]:
    num_rows = sum(tensor.shape[0] for tensor in x)
    rows = [tensor.new_empty(tensor.shape) for tensor in (*x, *residual)]
    if keep_text:
        rows.append(x[0].new_empty(num_text - num_constant, x[0].shape[1]))
    if keep_image:
        rows.append(x[-1].new_empty(num_rows - num_text, x[-1].shape[1]))
    return [*rows, x[0].new_empty(num_rows, dtype=torch.float32)]


def _fake_backward(
    dy: list[Tensor],
    x: list[Tensor],
    rstd: Tensor,
    text_weight: Tensor,
    image_weight: Tensor,
    num_text: int,
    dresidual: list[Tensor],
    text_grad: bool,
    image_grad: bool,
    recompute: bool,
) -> list[Tensor]:
    dx = [tensor.new_empty(tensor.shape) for tensor in x]
    wanted = [weight for weight, want in ((text_weight, text_grad), (image_weight, image_grad)) if want]
    y = [tensor.new_empty(tensor.shape) for tensor in x] if recompute else []
    return [*dx, *(weight.new_empty(weight.shape) for weight in wanted), *y]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, residual, text_weight, image_weight, num_text, *_ = inputs
    normed, rstd = output[len(x) : 2 * len(x)] if residual else x, output[-1]
    ctx.save_for_backward(*normed, rstd, text_weight, image_weight)
    ctx.num_text, ctx.has_residual = num_text, bool(residual)
    ctx.mark_non_differentiable(*output[len(x) + len(residual) :])  # the copies, and rstd
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    dx, *weight_grads = _gradients(ctx, grads, *ctx.needs_input_grad[2:4])
    # Arguments left at their defaults are not passed on and take no gradient.
    rest = [None] * (len(ctx.needs_input_grad) - 4)
    return dx, dx if ctx.has_residual else [], *weight_grads, *rest


def _gradients(
    ctx: Any, grads: list[Tensor | None], want_text: bool, want_image: bool
) -> tuple[list[Tensor] | list[None], Tensor | None, Tensor | None]:
    """The gradients of the normalised rows, of the text weight and of the image weight."""
    *x, rstd, text_weight, image_weight = ctx.saved_tensors
    dy = _filled(grads[: len(x)], x)
    dsum = _filled(grads[len(x) : 2 * len(x)], x) if ctx.has_residual else []
    if not dy:
        return dsum or [None] * len(x), None, None
    results = _ops.rms_norm_backward(
        dy, x, rstd, text_weight, image_weight, ctx.num_text, dsum, want_text, want_image, False
    )
    weight_grads = list(results[len(x) :])
    dtext_weight, dimage_weight = (weight_grads.pop(0) if want else None for want in (want_text, want_image))
    return results[: len(x)], dtext_weight, dimage_weight


def _filled(grads: list[Tensor | None], x: list[Tensor]) -> list[Tensor]:
    """`grads` with zeros for missing ones, or [] where all are missing."""
    if all(grad is None for grad in grads):
        return []
    return [torch.zeros_like(rows) if grad is None else grad for grad, rows in zip(grads, x, strict=True)]


# Without a residual there is a separate op, because AOTInductor turns the empty list of residuals into None.


def _alone(x: list[Tensor], text_weight: Tensor, image_weight: Tensor, num_text: int, eps: float) -> list[Tensor]:
    return _ops.rms_norm(x, [], text_weight, image_weight, num_text, eps)


def _fake_alone(x: list[Tensor], text_weight: Tensor, image_weight: Tensor, num_text: int, eps: float) -> list[Tensor]:
    return _fake(x, [], text_weight, image_weight, num_text, eps)


def _setup_context_alone(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, *rest = inputs
    _setup_context(ctx, (x, [], *rest), output)


def _backward_alone(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    return *_gradients(ctx, grads, *ctx.needs_input_grad[1:3]), None, None


_alone_library = torch.library.Library("lmfusion", "FRAGMENT")
_alone_library.define(
    "rms_norm_alone(Tensor[] x, Tensor text_weight, Tensor image_weight, SymInt num_text, float eps) -> Tensor[]"
)
_alone_library.impl("rms_norm_alone", _alone, "CompositeExplicitAutograd")
torch.library.register_fake("lmfusion::rms_norm_alone", _fake_alone, lib=_alone_library)
torch.library.register_autograd(
    "lmfusion::rms_norm_alone", _backward_alone, setup_context=_setup_context_alone, lib=_alone_library
)

if library.native:
    torch.library.register_fake("lmfusion::rms_norm", _fake)
    torch.library.register_fake("lmfusion::rms_norm_backward", _fake_backward)
    torch.library.register_autograd("lmfusion::rms_norm", _backward, setup_context=_setup_context)
    library.refuse_second_derivative("rms_norm_backward")

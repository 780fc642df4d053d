"""Projects each row with the weights of its own tower: one op around torch's GEMMs on the towers' contiguous slices.

For one tensor with both towers, both GEMMs write into one result, in the forward and in the backward, so nothing is
concatenated.
"""

from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels import reference
from lmfusion_kernels.block.weights import TowerRows
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.runtime.backends import choose_backend
from lmfusion_kernels.runtime.validation import check_rows, check_weight


def routed_linear(
    x: TowerRows,
    text_weight: Tensor,
    image_weight: Tensor,
    layout: TokenLayout,
    text_bias: Tensor | None = None,
    image_bias: Tensor | None = None,
    backend: str | None = None,
) -> TowerRows:
    """x @ weight.T + bias, text rows with the text tower's weight and bias, image rows with the image tower's.

    x: [N, d] in tower order, or the pair ([num_text, d_text], [num_image, d_image]). A tower's weight is [out, d], its
    bias [out], in the dtype of x; `out` may differ between the towers in the pair form only. backend: None (choose),
    "native" or "reference". The result has the form of x.

    A weight or bias that requires no gradient gets none. Raises ValueError for shapes, dtypes or devices that do not
    match.
    """
    rows = check_rows(x, layout)
    check_weight(text_weight, (-1, rows[0].shape[1]), rows[0], "text_weight")
    check_weight(image_weight, (-1, rows[-1].shape[1]), rows[-1], "image_weight")
    check_weight(text_bias, (text_weight.shape[0],), rows[0], "text_bias")
    check_weight(image_bias, (image_weight.shape[0],), rows[-1], "image_bias")
    is_joined = isinstance(x, Tensor)
    if is_joined and text_weight.shape[0] != image_weight.shape[0]:
        raise ValueError(
            "text_weight and image_weight must have the same number of rows for one result, got "
            f"{text_weight.shape[0]} and {image_weight.shape[0]}; pass x as a pair (text rows, image rows)"
        )
    others = (*rows, text_weight, image_weight, text_bias, image_bias)
    if choose_backend(backend, rows[0], others=others) == "reference":
        return reference.routed_linear(x, text_weight, image_weight, layout, text_bias, image_bias)
    out = apply_linear(rows, text_weight, image_weight, text_bias, image_bias, layout.num_text, is_joined)
    return out[0] if is_joined else (out[0], out[1])


library = torch.library.Library("lmfusion", "FRAGMENT")
library.define(
    "routed_linear(Tensor[] x, Tensor text_weight, Tensor image_weight, Tensor? text_bias, Tensor? image_bias, "
    "SymInt num_text, bool joined) -> Tensor[]"
)
apply_linear = torch.ops.lmfusion.routed_linear
"""x and the result: one tensor, or one per tower; `joined` asks for one result, whatever x is."""


def _split(rows: list[Tensor], num_text: int) -> tuple[Tensor, Tensor]:
    """The text rows and the image rows, as views."""
    if len(rows) == 2:
        return rows[0], rows[1]
    return rows[0][:num_text], rows[0][num_text:]


def _forward(
    x: list[Tensor],
    text_weight: Tensor,
    image_weight: Tensor,
    text_bias: Tensor | None,
    image_bias: Tensor | None,
    num_text: int,
    joined: bool,
) -> list[Tensor]:
    result = _fake(x, text_weight, image_weight, text_bias, image_bias, num_text, joined)
    towers = zip(_split(x, num_text), (text_weight, image_weight), (text_bias, image_bias), strict=True)
    for out, (rows, weight, bias) in zip(_split(result, num_text), towers, strict=True):
        if bias is None:
            torch.mm(rows, weight.t(), out=out)
        else:
            torch.addmm(bias, rows, weight.t(), out=out)
    return result


def _fake(
    x: list[Tensor],
    text_weight: Tensor,
    image_weight: Tensor,
    text_bias: Tensor | None,
    image_bias: Tensor | None,
    num_text: int,
    joined: bool,
) -> list[Tensor]:
    num_rows = sum(tensor.shape[0] for tensor in x)
    if joined:
        return [x[0].new_empty(num_rows, text_weight.shape[0])]
    num_image = num_rows - num_text
    return [x[0].new_empty(num_text, text_weight.shape[0]), x[0].new_empty(num_image, image_weight.shape[0])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, text_weight, image_weight, _, _, num_text, _ = inputs
    needs_rows = ctx.needs_input_grad[len(x)] or ctx.needs_input_grad[len(x) + 1]  # flat here, nested in the backward
    needs_weights = any(ctx.needs_input_grad[: len(x)])
    ctx.save_for_backward(*(x if needs_rows else ()), *((text_weight, image_weight) if needs_weights else ()))
    ctx.num_text, ctx.num_saved_rows, ctx.joined = num_text, len(x) if needs_rows else 0, len(x) == 1


def _backward(ctx: Any, dy: list[Tensor]) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    x, weights = tensors[: ctx.num_saved_rows], tensors[ctx.num_saved_rows :]
    needs_x, *needs = ctx.needs_input_grad
    dx: list[Any] = [None] * len(needs_x)
    if any(needs_x):
        transposed = [weight.t() for weight in weights]
        dx = apply_linear(dy, *transposed, None, None, ctx.num_text, ctx.joined)
    dys = _split(dy, ctx.num_text)
    weight_grads: list[Tensor | None] = [None, None]
    if any(needs[:2]):
        xs = _split(x, ctx.num_text)
        weight_grads = [torch.mm(d.t(), r) if want else None for d, r, want in zip(dys, xs, needs[:2], strict=True)]
    bias_grads = [d.sum(0) if want else None for d, want in zip(dys, needs[2:4], strict=True)]
    return dx, *weight_grads, *bias_grads, None, None


library.impl("routed_linear", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("lmfusion::routed_linear", _fake, lib=library)
torch.library.register_autograd("lmfusion::routed_linear", _backward, setup_context=_setup_context, lib=library)

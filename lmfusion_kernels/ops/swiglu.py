"""SwiGLU and the feed-forward networks of two towers around it: public wrappers, shapes under tracing, autograd."""

from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels import reference
from lmfusion_kernels.block.weights import TowerRows, split_towers
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.ops.gate_up_swiglu import choose_ffn
from lmfusion_kernels.ops.linear import apply_linear
from lmfusion_kernels.runtime import library
from lmfusion_kernels.runtime.backends import choose_backend
from lmfusion_kernels.runtime.validation import check_rows, check_weight

_ops = torch.ops.lmfusion


def swiglu(gate_up: Tensor, backend: str | None = None) -> Tensor:
    """silu(gate) * up, with gate_up [N, 2 I] the two halves side by side. Returns [N, I].

    Raises ValueError for another shape.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [N, 2 I], gate and up side by side, got shape {tuple(gate_up.shape)}")
    if choose_backend(backend, gate_up) == "reference":
        return reference.swiglu(gate_up)
    return _ops.swiglu([gate_up])[0]


def routed_swiglu(
    x: TowerRows,
    text_gate_up: Tensor,
    text_down: Tensor,
    image_gate_up: Tensor,
    image_down: Tensor,
    layout: TokenLayout,
    backend: str | None = None,
) -> TowerRows:
    """down(silu(gate(x)) * up(x)), each row through the feed-forward network of its own tower.

    x: [N, d] in tower order, or the pair ([num_text, d_text], [num_image, d_image]). A tower's gate_up [2 I, d] holds
    the gate's rows, then the up projection's; its down is [d, I]; both in the dtype of x. I may differ between towers.
    backend: None (choose), "native" or "reference". The result has the form of x.

    A weight that requires no gradient gets none. Raises ValueError for shapes, dtypes or devices that do not match, and
    where the kernel that LMFUSION_KERNELS_FFN asks for cannot run (see `lmfusion_kernels.ops.gate_up_swiglu`).
    """
    rows = check_rows(x, layout)
    towers = (("text", rows[0], text_gate_up, text_down), ("image", rows[-1], image_gate_up, image_down))
    for name, tower_rows, gate_up, down in towers:
        width = tower_rows.shape[1]
        check_weight(gate_up, (-1, width), tower_rows, f"{name}_gate_up")
        check_weight(down, (width, -1), tower_rows, f"{name}_down")
        if gate_up.shape[0] != 2 * down.shape[1]:
            raise ValueError(
                f"{name}_gate_up must have two rows (gate and up) for every column of {name}_down, got "
                f"{gate_up.shape[0]} rows and {down.shape[1]} columns"
            )
    others = (*rows, text_gate_up, text_down, image_gate_up, image_down)
    if choose_backend(backend, rows[0], others=others) == "reference":
        return reference.routed_swiglu(x, text_gate_up, text_down, image_gate_up, image_down, layout)
    is_joined = isinstance(x, Tensor)
    # Between the projections the towers may differ in width. Their rows stay in one tensor only if they do not.
    is_hidden_joined = is_joined and text_gate_up.shape[0] == image_gate_up.shape[0]
    by_tower, weights = split_towers(x, layout), (text_gate_up, image_gate_up)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, *weights))
    kernel = choose_ffn(by_tower, weights, keep=needs_grad)
    if kernel == "two-calls":
        hidden = _ops.swiglu(apply_linear(rows, *weights, None, None, layout.num_text, is_hidden_joined))
    else:
        hidden = _ops.gate_up_swiglu(*by_tower, *weights, 0, needs_grad, kernel)[:2]
    out = apply_linear(hidden, text_down, image_down, None, None, layout.num_text, is_joined)
    return out[0] if is_joined else (out[0], out[1])


def _fake(gate_up: list[Tensor], num_constant: int = 0, keep: bool = False) -> list[Tensor]:
    kept = [gate_up[0].new_empty(gate_up[0].shape[0] - num_constant, gate_up[0].shape[1])] if keep else []
    return [*(tensor.new_empty(tensor.shape[0], tensor.shape[1] // 2) for tensor in gate_up), *kept]


def _fake_backward(dy: list[Tensor], gate_up: list[Tensor], recompute: bool) -> list[Tensor]:
    y = [tensor.new_empty(tensor.shape) for tensor in dy] if recompute else []
    return [*(tensor.new_empty(tensor.shape) for tensor in gate_up), *y]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    gate_up = inputs[0]
    ctx.save_for_backward(*gate_up)
    ctx.mark_non_differentiable(*output[len(gate_up) :])  # the copies


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    gate_up = ctx.saved_tensors
    # Arguments left at their defaults are not passed on and take no gradient.
    rest = [None] * (len(ctx.needs_input_grad) - 1)
    return _ops.swiglu_backward(grads[: len(gate_up)], gate_up, False), *rest


if library.native:
    torch.library.register_fake("lmfusion::swiglu", _fake)
    torch.library.register_fake("lmfusion::swiglu_backward", _fake_backward)
    torch.library.register_autograd("lmfusion::swiglu", _backward, setup_context=_setup_context)
    library.refuse_second_derivative("swiglu_backward")

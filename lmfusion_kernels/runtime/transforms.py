"""Derivatives and transforms of the native ops: reverse mode works, the rest raises or runs the reference.

The compiled ops have a backward and nothing else. Inside torch.func's reverse-mode transforms and vmap, the reference
runs in their place. An op without a forward-mode formula would silently return a derivative of zero, so forward mode
raises.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import _get_dispatch_mode_pre_dispatch
from torch.autograd import forward_ad

from lmfusion_kernels.runtime.device import constant_result

INSIDE_TRANSFORM = "it does not run inside torch.func's transforms"
_FORWARD_MODE = (
    "the native backend has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad); "
    "pass backend='reference', which has one, or take the derivative in reverse mode"
)


def is_tracing() -> bool:
    """Whether ops are recorded in a graph, by torch.compile, torch.export or make_fx."""
    if torch.compiler.is_compiling():
        return True
    key = torch._C._TorchDispatchModeKey.PROXY
    return torch._C._get_dispatch_mode(key) is not None or _get_dispatch_mode_pre_dispatch(key) is not None


def is_transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether torch.func's vmap, grad or another transform is active on one of the tensors.

    While torch.compile or torch.export traces: whether one is active at all.
    """
    if torch.compiler.is_compiling():
        return _are_transforms_active()
    return torch._C._are_functorch_transforms_active() and any(map(_is_wrapped, tensors))


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a forward-mode derivative is taken through one of the tensors.

    While torch.compile or torch.export traces: whether one is taken at all.
    """
    if torch.compiler.is_compiling():
        return _is_forward_mode_active()
    return forward_ad._current_level >= 0 and any(map(_carries_tangent, tensors))


def refuse_forward_mode(tensors: Iterable[Tensor | None]) -> None:
    """Raise RuntimeError if a forward-mode derivative is taken through one of the tensors."""
    if has_tangent(tensors):
        raise RuntimeError(_FORWARD_MODE)


def _is_wrapped(tensor: Tensor | None) -> bool:
    return tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _carries_tangent(tensor: Tensor | None) -> bool:
    if tensor is None:
        return False
    if not _is_wrapped(tensor):
        return forward_ad.unpack_dual(tensor).tangent is not None
    functorch = torch._C._functorch
    *outer, innermost = (
        level.key() == functorch.TransformType.Jvp for level in functorch.get_interpreter_stack() or []
    )
    if innermost and forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    inside = functorch.get_unwrapped(tensor)
    if _is_wrapped(inside):
        return any(outer)  # tangents are known for the innermost transform only
    return _carries_tangent(inside)


@constant_result
def _are_transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active()


@constant_result
def _is_forward_mode_active() -> bool:
    return forward_ad._current_level >= 0


class Link(torch.autograd.Function):
    """An empty tensor through which the graph reaches the inputs without keeping their memory alive."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.num_inputs


class NoSecondDerivative(torch.autograd.Function):
    """Passes gradients on; their own derivative raises: `apply(op, num_grads, *grads, *inputs)`.

    The inputs are those of the op, so that the graph reaches them and autograd does not report them as unused.
    """

    @staticmethod
    def forward(ctx: Any, op: str, num_grads: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tensors[:num_grads]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.op} of the native backend has no second derivative; backend='reference' has")

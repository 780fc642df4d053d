"""Permutes rows of any dtype: public wrapper, shapes under tracing, autograd.

For `TokenLayout`. The gradient of a permutation is the inverse permutation; PyTorch's index_select would add rows up
instead.
"""

from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels.runtime import library
from lmfusion_kernels.runtime.backends import choose_backend
from lmfusion_kernels.runtime.transforms import has_tangent, is_transformed

_ops = torch.ops.lmfusion


def reorder_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Row i of the result is row index[i] of x [N, ...].

    index: int32 [N], a permutation on the device of x; inverse: int32 [N], the inverse permutation. Any dtype.
    Plain PyTorch runs where the native op cannot, as in torch.func's transforms and in forward-mode derivatives.
    """
    if choose_backend(None, index) == "reference" or has_tangent((x,)) or is_transformed((x,)):
        return x.index_select(0, index)
    return _ops.reorder_rows(x, index, inverse)


def _fake(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, inverse = inputs
    ctx.save_for_backward(index, inverse)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return _ops.reorder_rows(dy, inverse, index), None, None


if library.native:
    torch.library.register_fake("lmfusion::reorder_rows", _fake)
    torch.library.register_autograd("lmfusion::reorder_rows", _backward, setup_context=_setup_context)

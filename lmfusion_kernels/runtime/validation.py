"""Checks the arguments of ops. A ValueError says what must hold, what was given, and what to do."""

import torch
from torch import Tensor

from lmfusion_kernels.block.weights import TowerRows
from lmfusion_kernels.layout.token_layout import TokenLayout


def check_rows(x: TowerRows, layout: TokenLayout, name: str = "x") -> list[Tensor]:
    """The tensors of `x`: one with the rows of both towers, or one per tower.

    Raises ValueError unless all are [rows, width], on the layout's device and in one dtype of `ROW_DTYPES`.
    """
    tensors = [x] if isinstance(x, Tensor) else list(x)
    if len(tensors) > 2 or not tensors:
        raise ValueError(
            f"{name} must be one tensor [N, d] or the pair (text rows, image rows), got {len(tensors)} tensors"
        )
    counts = [layout.num_tokens] if len(tensors) == 1 else [layout.num_text, layout.num_image]
    for tensor, num_rows in zip(tensors, counts, strict=True):
        layout.check_rows(tensor, num_rows, name)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be [rows, width], got shape {tuple(tensor.shape)}; flatten the rest")
        check_dtype(tensor, tensors[0], name)
    return tensors


def check_like(tensors: list[Tensor], like: list[Tensor], name: str) -> None:
    """Raise ValueError unless `tensors` match the tensors of x in shapes and dtype."""
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in like]:
        shapes, expected = ([tuple(tensor.shape) for tensor in some] for some in (tensors, like))
        raise ValueError(f"{name} must have the shapes of x, {expected}, got {shapes}")
    check_dtype(tensors[0], like[0], name)


def check_weight(weight: Tensor | None, shape: tuple[int, ...], x: Tensor, name: str) -> None:
    """Raise ValueError unless `weight` (None passes) has this shape (-1: any size) and the dtype and device of `x`."""
    if weight is None:
        return
    fits = weight.dim() == len(shape) and all(
        size in (-1, have) for size, have in zip(shape, weight.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("*" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{name} must be [{expected}] for rows of width {x.shape[1]}, got shape {tuple(weight.shape)}")
    check_dtype(weight, x, name)


def check_dtype(tensor: Tensor, x: Tensor, name: str) -> None:
    """Raise ValueError unless `tensor` has the dtype and device of `x`."""
    if tensor.dtype != x.dtype:
        raise ValueError(
            f"{name} must be in the rows' dtype {x.dtype}, got {tensor.dtype}; cast it with {name}.to({x.dtype})"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the rows' device {x.device}, got {tensor.device}; move one to the other")


def check_rope(cos: Tensor, sin: Tensor, layout: TokenLayout, x: Tensor) -> None:
    """Raise ValueError unless cos and sin are float32 tables of angles for the rows `x` and their layout."""
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] != layout.num_tokens:
        raise ValueError(
            f"rope's cos and sin must be [N, D/2] with N = {layout.num_tokens} tokens, got shapes {tuple(cos.shape)} "
            f"and {tuple(sin.shape)}; make them with rope_tables(layout.position, inv_freq)"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 and not (table.dtype == x.dtype == torch.float64):
            raise ValueError(
                f"rope's {name} must be float32, got {table.dtype}. Make the tables in float32, and pass "
                "lk.RopeTables(cos, sin), as rope_tables returns: FSDP2 and DDP with mixed precision cast a plain pair"
            )
        if table.device != x.device:
            raise ValueError(f"rope's {name} must be on the rows' device {x.device}, got {table.device}; move it")

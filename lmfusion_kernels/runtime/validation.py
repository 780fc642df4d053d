"""What do the ops demand of their arguments? One ValueError each: the argument, what it is, what it has to be."""

import torch
from torch import Tensor

from lmfusion_kernels.block.weights import Rows
from lmfusion_kernels.layout.token_layout import TokenLayout


def check_rows(x: Rows, layout: TokenLayout, name: str = "x") -> list[Tensor]:
    """The tensors of `x`: one with the rows of both towers, or one a tower, all [rows, width], of one dtype that ops
    compute with (`layout.ROW_DTYPES`) and on the layout's device. Raises ValueError otherwise."""
    tensors = [x] if isinstance(x, Tensor) else list(x)
    if len(tensors) > 2 or not tensors:
        raise ValueError(
            f"{name} holds {len(tensors)} tensors; it is one tensor [N, d] or the pair (text rows, image rows)"
        )
    counts = [layout.num_tokens] if len(tensors) == 1 else [layout.num_text, layout.num_image]
    for tensor, num_rows in zip(tensors, counts, strict=True):
        layout.check_rows(tensor, num_rows, name)
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; rows are [rows, width], so flatten what follows")
        check_dtype(tensor, tensors[0], name)
    return tensors


def check_like(tensors: list[Tensor], like: list[Tensor], name: str) -> None:
    """Raise ValueError unless the rows `tensors` are held like those of x."""
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in like]:
        shapes, expected = ([tuple(tensor.shape) for tensor in some] for some in (tensors, like))
        raise ValueError(f"{name} has shapes {shapes}, x {expected}; they must be alike")
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
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}, expected [{expected}] for rows of width {x.shape[1]}"
        )
    check_dtype(weight, x, name)


def check_dtype(tensor: Tensor, x: Tensor, name: str) -> None:
    """Raise ValueError unless `tensor` has the dtype and device of `x`."""
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name} is {tensor.dtype}, the rows are {x.dtype}; cast it with {name}.to({x.dtype})")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, the rows are on {x.device}; move one to the other")


def check_rope(cos: Tensor, sin: Tensor, layout: TokenLayout, x: Tensor) -> None:
    """Raise ValueError unless cos and sin are float32 tables of angles for the rows `x` and their layout."""
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] != layout.num_tokens:
        raise ValueError(
            f"rope's cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}; they are [N, D/2] with "
            f"N = {layout.num_tokens} tokens, as rope_tables(layout.position, inv_freq) makes them"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 and not (table.dtype == x.dtype == torch.float64):
            raise ValueError(
                f"rope's {name} is {table.dtype}; angles need float32. Make the tables in float32, and pass "
                "lk.RopeTables(cos, sin), as rope_tables returns: FSDP2 and DDP with mixed precision cast a plain pair"
            )
        if table.device != x.device:
            raise ValueError(f"rope's {name} is on {table.device}, the rows on {x.device}; move one to the other")

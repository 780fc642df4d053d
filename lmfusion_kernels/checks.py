"""What do the ops demand of their arguments? One ValueError each: the argument, what it is, what it has to be."""

from torch import Tensor

from lmfusion_kernels.layout import TokenLayout
from lmfusion_kernels.weights import Rows


def check_rows(x: Rows, layout: TokenLayout, name: str = "x") -> list[Tensor]:
    """The tensors of `x`: one with the rows of both towers, or one a tower, all [rows, width] and of one dtype."""
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

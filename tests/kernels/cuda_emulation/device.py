"""Tensors for the emulation: layouts in the emulated device's memory, and rows without alignment."""

import torch
from torch import Tensor

import lmfusion_kernels as lk
from tests.kernels.ops import row_ops


def to_device(layout: lk.TokenLayout) -> lk.TokenLayout:
    """A copy in memory of the allocator that the emulation watches."""
    return layout.with_vectors({name: vector.clone() for name, vector in layout.vectors.items()})


def make_layout(name: str) -> lk.TokenLayout:
    return to_device(row_ops.make_layout(name))


def from_spans(documents: list[list[tuple[str, int]]]) -> lk.TokenLayout:
    return to_device(lk.TokenLayout.from_spans(documents))


def shifted(x: Tensor) -> Tensor:
    """A contiguous copy that starts one element after an address aligned to 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

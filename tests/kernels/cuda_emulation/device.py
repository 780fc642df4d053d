"""Tensors for the emulation: layouts in the emulated device's memory, and rows without alignment."""

from dataclasses import fields, replace

import torch
from torch import Tensor

import lmfusion_kernels as lk
from tests.kernels.ops import row_ops


def to_device(layout: lk.TokenLayout) -> lk.TokenLayout:
    """A copy in memory of the allocator that the emulation checks."""
    values = {field.name: getattr(layout, field.name) for field in fields(layout) if field.init}
    return replace(layout, **{name: value.clone() for name, value in values.items() if isinstance(value, Tensor)})


def make_layout(name: str) -> lk.TokenLayout:
    return to_device(row_ops.make_layout(name))


def from_spans(documents: list[list[tuple[str, int]]]) -> lk.TokenLayout:
    return to_device(lk.TokenLayout.from_spans(documents))


def shifted(x: Tensor) -> Tensor:
    """A contiguous copy that starts one element after an address aligned to 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

"""Layouts whose vectors are in the emulated device's memory, where the host's own would be."""

from dataclasses import fields, replace

from torch import Tensor

import lmfusion_kernels as lk
from tests import row_ops


def to_device(layout: lk.TokenLayout) -> lk.TokenLayout:
    """A copy in memory of the allocator that the emulation watches."""
    values = {field.name: getattr(layout, field.name) for field in fields(layout) if field.init}
    return replace(layout, **{name: value.clone() for name, value in values.items() if isinstance(value, Tensor)})


def make_layout(name: str) -> lk.TokenLayout:
    return to_device(row_ops.make_layout(name))


def from_spans(documents: list[list[tuple[str, int]]]) -> lk.TokenLayout:
    return to_device(lk.TokenLayout.from_spans(documents))

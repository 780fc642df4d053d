"""Global memory with guard zones between tensors, and the tensor maps of TMA with the limits that CUDA sets them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tests.kernels.ptx_emulation.values import EmulationError

PARAMETER_BASE = 0x500000000000
"""Where the generic addresses of parameters begin."""
SHARED_BASE = 0x600000000000
_GLOBAL_BASE = 0x7F0000000000
_GAP = 1 << 20
SWIZZLE_BITS = {0: 0, 1: 0x10, 2: 0x30, 3: 0x70}
"""Bits of an address that are exchanged with those three places higher, by CUDA's number of the swizzle."""


class _Segment(NamedTuple):
    base: int
    data: np.ndarray
    name: str
    is_written: bool


class GlobalMemory:
    """Tensors at addresses far apart, so that an access beyond one of them is found."""

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._next = _GLOBAL_BASE

    def add(self, data: np.ndarray, name: str, is_written: bool = True) -> int:
        """The address of `data`, uint8 [bytes], whose own alignment to 16 bytes is kept."""
        base = self._next + data.ctypes.data % 16
        self._next += (data.size // _GAP + 2) * _GAP
        self._segments.append(_Segment(base, data, name, is_written))
        return base

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8 [n, size] at each of n addresses."""
        base, data = self._find(addresses, size, is_written=False)
        return data[(addresses - base)[:, None] + np.arange(size)]

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        base, data = self._find(addresses, values.shape[1], is_written=True)
        data[(addresses - base)[:, None] + np.arange(values.shape[1])] = values

    def _find(self, addresses: np.ndarray, size: int, is_written: bool) -> tuple[int, np.ndarray]:
        low, high = int(addresses.min()), int(addresses.max()) + size
        if (addresses % min(size, 16)).any():
            raise EmulationError(f"access of {size} bytes at an address that is not a multiple of that")
        for segment in self._segments:
            if segment.base - _GAP // 2 <= low < segment.base + segment.data.size + _GAP // 2:
                first, last = low - segment.base, high - segment.base
                if first < 0 or last > segment.data.size:
                    raise EmulationError(f"{segment.name} has {segment.data.size} bytes; [{first}, {last}) is accessed")
                if is_written and not segment.is_written:
                    raise EmulationError(f"{segment.name} is written, which is only read elsewhere")
                return segment.base, segment.data
        raise EmulationError(f"access at {low:#x}, where no tensor is")


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled takes, the innermost dimension first. Raises EmulationError where it would fail."""

    base: int
    element_size: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """In bytes, of all dimensions but the innermost."""
    box: tuple[int, ...]
    swizzle: int

    def __post_init__(self) -> None:
        inner = self.box[0] * self.element_size
        largest = {0: 256 * self.element_size, 1: 32, 2: 64, 3: 128}[self.swizzle]
        faults = {
            "the base must be a multiple of 16": self.base % 16 == 0,
            "sizes must be from 1 to 2^32": all(0 < size <= 2**32 for size in self.sizes),
            "strides must be multiples of 16 below 2^40": all(s % 16 == 0 and 0 <= s < 2**40 for s in self.strides),
            "a box must have 1 to 256 elements a dimension": all(0 < size <= 256 for size in self.box),
            "the inner box must be a multiple of 16 bytes": inner % 16 == 0,
            f"the inner box must be at most {largest} bytes": inner <= largest,
        }
        broken = [fault for fault, is_right in faults.items() if not is_right]
        if broken:
            raise EmulationError(f"{self}: {'; '.join(broken)}")

    def elements(self, coordinates: list[int], shared: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a box: addresses in shared memory, addresses in global memory, and whether these are within the tensor.

        shared: where the box begins. Arrays [rows, inner].
        """
        rows = np.arange(int(np.prod(self.box[1:])))
        offsets, is_inside, rest = np.zeros(rows.size, np.int64), np.ones(rows.size, bool), rows
        for i in range(1, len(self.box)):
            at = rest % self.box[i] + coordinates[i]
            rest = rest // self.box[i]
            is_inside &= (at >= 0) & (at < self.sizes[i])
            offsets += at * self.strides[i - 1]
        column = np.arange(self.box[0]) + coordinates[0]
        inner = self.box[0] * self.element_size
        to = shared + rows[:, None] * inner + np.arange(self.box[0]) * self.element_size
        bits = SWIZZLE_BITS[self.swizzle]
        to = to ^ ((to >> 3) & bits)
        of = self.base + offsets[:, None] + column * self.element_size
        return to, of, is_inside[:, None] & ((column >= 0) & (column < self.sizes[0]))

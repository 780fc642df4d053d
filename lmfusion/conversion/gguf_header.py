"""Headers of GGUF files: metadata and places of tensors, each length checked against the file before it is used."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letter of each type of number, by GGUF's number of the type."""
_LEAST_ENTRY = 13
"""Bytes that an entry of metadata takes at least: the length of its name, a type, and a byte."""
_LEAST_TENSOR = 24
"""Bytes that the description of a tensor takes at least."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in the file."""

    shape: tuple[int, ...]
    """As in PyTorch: the last dimension is the one whose values lie side by side."""
    kind: GGMLQuantizationType
    offset: int
    """Of its first byte, from the beginning of the file."""
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file whose header has been read and whose tensors have not."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, texts, and lists of one of them."""
    tensors: dict[str, GGUFTensor]

    def read(self, name: str) -> np.ndarray:
        """The tensor called `name`, dequantised: float32. Raises ValueError for a type that cannot be."""
        tensor = self.tensors[name]
        data = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.num_bytes,))
        block_values, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        rows = data.reshape(-1, tensor.shape[-1] // block_values * block_bytes)
        try:
            return np.array(dequantize(rows, tensor.kind), np.float32).reshape(tensor.shape)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: the tensor {name!r} cannot be read: {error}") from error


def read_header(path: Path) -> GGUFFile:
    """The header of the GGUF file at `path`.

    Raises ValueError for what is no GGUF file of version 2 or 3, and for one that is truncated or damaged.
    """
    try:
        # An empty file cannot be mapped
        data: Any = np.memmap(path, np.uint8, "r") if path.stat().st_size else b""
        return _Reader(memoryview(data)).file(path)
    except ValueError as error:  # _DamagedError, and bytes that are no UTF-8
        raise ValueError(f"{path} is truncated or no GGUF file ({error}); copy it again from its source") from error


class _DamagedError(ValueError):
    """The header contradicts itself, or the length of the file."""


class _Reader:
    """A place in the bytes of the file, from which values are read one after the other."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def file(self, path: Path) -> GGUFFile:
        """Everything, from the beginning of the file."""
        if bytes(self._take(4)) != b"GGUF":
            raise _DamagedError("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            raise _DamagedError(f"its version is {version}" if not big_endian else "its byte order is big-endian")
        num_tensors, num_entries = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(num_entries, _LEAST_ENTRY, "entries of metadata")):
            name = self._string()
            if name in metadata:
                raise _DamagedError(f"it holds {name!r:.80} twice")
            metadata[name] = self._value(self._number("I"))
        places = [self._tensor() for _ in range(self._count(num_tensors, _LEAST_TENSOR, "tensors"))]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _DamagedError(f"general.alignment is {alignment!r:.80}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in places:
            if name in tensors:
                raise _DamagedError(f"it holds the tensor {name!r:.80} twice")
            tensors[name] = self._placed(name, shape, kind, start + offset)
        return GGUFFile(path, metadata, tensors)

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        try:
            known = GGMLQuantizationType(kind)
            block_values, block_bytes = GGML_QUANT_SIZES[known]
        except (ValueError, KeyError):
            raise _DamagedError(f"the tensor {name!r:.80} is of an unknown type, {kind}") from None
        num_values = math.prod(shape)
        if num_values == 0:
            raise _DamagedError(f"the tensor {name!r:.80} is empty")
        if shape[-1] % block_values:
            raise _DamagedError(f"rows of the tensor {name!r:.80} must be whole blocks of {known.name}")
        num_bytes = num_values // block_values * block_bytes
        if offset + num_bytes > len(self._data):
            raise _DamagedError(f"the tensor {name!r:.80} ends after the file")
        return GGUFTensor(shape, known, offset, num_bytes)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._number("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise _DamagedError(f"the tensor {name!r:.80} has {num_dimensions} dimensions")
        shape = struct.unpack(f"<{num_dimensions}Q", self._take(8 * num_dimensions))
        return name, tuple(reversed(shape)), self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(self._scalar(kind))
        element, count = self._number("I"), self._number("Q")
        if element == _STRING:
            return [self._string() for _ in range(self._count(count, 8, "texts in a list"))]
        letter = self._scalar(element)  # lists of lists are in no file that llama.cpp reads
        size = struct.calcsize(f"<{letter}")
        return list(
            struct.unpack(f"<{self._count(count, size, 'numbers in a list')}{letter}", self._take(size * count))
        )

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _DamagedError(f"it holds a value of the unknown type {kind}")
        return _SCALARS[kind]

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _string(self) -> str:
        return bytes(self._take(self._number("Q"))).decode()

    def _count(self, count: int, least_bytes: int, what: str) -> int:
        """`count`, unless the rest of the file is too short for so many."""
        if count * least_bytes > len(self._data) - self._at:
            raise _DamagedError(f"it is too short for {count} {what}")
        return count

    def _take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self._data) - self._at:
            raise _DamagedError("it ends too early")
        taken = self._data[self._at : self._at + num_bytes]
        self._at += num_bytes
        return taken

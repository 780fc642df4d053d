"""Reads headers of GGUF files: metadata and tensor positions. Each length is checked against the file before use."""

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
"""struct's letter for each of GGUF's number types."""
_MIN_ENTRY_BYTES = 13
"""The smallest entry of metadata: the length of its name, a type, and a byte."""
_MIN_TENSOR_BYTES = 24
"""The smallest description of a tensor."""


@dataclass(frozen=True)
class GGUFTensor:
    """The position of a tensor in the file."""

    shape: tuple[int, ...]
    """As in PyTorch: values along the last dimension are adjacent."""
    kind: GGMLQuantizationType
    offset: int
    """Of its first byte, from the start of the file."""
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file whose header has been read and whose tensors have not."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, texts, and lists of either."""
    tensors: dict[str, GGUFTensor]

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, dequantised to float32. Raises ValueError for a type that cannot be dequantised."""
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

    Raises ValueError for a file that is not GGUF of version 2 or 3, or is truncated or damaged.
    """
    try:
        # An empty file cannot be mapped
        data: Any = np.memmap(path, np.uint8, "r") if path.stat().st_size else b""
        return _Reader(memoryview(data)).file(path)
    except ValueError as error:  # _DamagedError, or bytes that are not UTF-8
        raise ValueError(f"{path} is truncated or not a GGUF file ({error}); copy it again from its source") from error


class _DamagedError(ValueError):
    """The header contradicts itself or the length of the file."""


class _Reader:
    """Reads values one after the other from the bytes of the file."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def file(self, path: Path) -> GGUFFile:
        """The whole header, from the start of the file."""
        if bytes(self._take(4)) != b"GGUF":
            raise _DamagedError("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            raise _DamagedError(f"its version is {version}" if not big_endian else "its byte order is big-endian")
        num_tensors, num_entries = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(num_entries, _MIN_ENTRY_BYTES, "entries of metadata")):
            name = self._string()
            if name in metadata:
                raise _DamagedError(f"it holds {name!r:.80} twice")
            metadata[name] = self._value(self._number("I"))
        descriptions = [self._tensor() for _ in range(self._count(num_tensors, _MIN_TENSOR_BYTES, "tensors"))]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _DamagedError(f"general.alignment is {alignment!r:.80}")
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in descriptions:
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
        letter = self._scalar(element)  # llama.cpp reads no lists of lists either
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

    def _count(self, count: int, min_bytes: int, what: str) -> int:
        """`count`, if the rest of the file is long enough for it. what: names the things that are counted."""
        if count * min_bytes > len(self._data) - self._position:
            raise _DamagedError(f"it is too short for {count} {what}")
        return count

    def _take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self._data) - self._position:
            raise _DamagedError("it ends too early")
        taken = self._data[self._position : self._position + num_bytes]
        self._position += num_bytes
        return taken

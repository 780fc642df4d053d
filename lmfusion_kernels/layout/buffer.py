"""Packs vectors into one buffer, so that they move in one transfer and a traced op takes them as one argument."""

import numpy as np
import torch
from torch import Tensor


def copy_together(vectors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Copies of vectors of one dtype on `device`, as parts of one buffer: one transfer."""
    first = next(iter(vectors.values()))
    is_upload = first.device.type == "cpu" and torch.device(device).type == "cuda"
    return unpack(pack(vectors, pin_memory=is_upload).to(device, non_blocking=True), vectors)


def pack(vectors: dict[str, Tensor], pin_memory: bool = False) -> Tensor:
    """Copies of vectors of one dtype, one after another in one buffer. pin_memory: in page-locked memory, from which a
    copy to a GPU is asynchronous.

    Each vector begins at a multiple of 64 bytes, as a separate allocation would: kernels may be compiled for aligned
    pointers.
    """
    first, sizes = next(iter(vectors.values())), _padded_sizes(vectors)
    buffer = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device, pin_memory=pin_memory)
    for part, vector in zip(buffer.split(sizes), vectors.values(), strict=True):
        part[: vector.numel()] = vector
    return buffer


def unpack(buffer: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a buffer that `pack` made of vectors of these names and sizes."""
    parts = buffer.split(_padded_sizes(like))
    return {name: part[: vector.numel()] for (name, vector), part in zip(like.items(), parts, strict=True)}


def _padded_sizes(vectors: dict[str, Tensor]) -> list[int]:
    return [padded(vector.numel()) for vector in vectors.values()]


def padded(size: int) -> int:
    """The entries of the buffer that a vector of this size takes."""
    return -(-size // 16) * 16


def pack_arrays(vectors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Parts of one buffer with the contents of int32 arrays, as `unpack` makes them."""
    offsets = np.cumsum([0, *(padded(vector.size) for vector in vectors.values())]).tolist()
    buffer = np.zeros(offsets[-1], np.int32)
    for offset, vector in zip(offsets, vectors.values(), strict=False):
        buffer[offset : offset + vector.size] = vector
    whole = torch.from_numpy(buffer)
    return {
        name: whole[offset : offset + vector.size]
        for offset, (name, vector) in zip(offsets, vectors.items(), strict=False)
    }


def buffer_of(vectors: dict[str, Tensor]) -> Tensor | None:
    """The buffer that `unpack` cut the vectors from; None if they come from elsewhere."""
    buffer: Tensor | None = next(iter(vectors.values()))._base
    if buffer is None or buffer.dim() != 1:
        return None
    offset = buffer.storage_offset()
    for vector, size in zip(vectors.values(), _padded_sizes(vectors), strict=True):
        if vector._base is not buffer or (vector.numel() and vector.storage_offset() != offset):
            return None
        offset += size
    return buffer if offset == buffer.storage_offset() + buffer.numel() else None

"""Checks and prepares the arguments of Triton attention on the host: alignment, descriptors, sizes for the launches."""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lmfusion_kernels.triton.hybrid_attention_configurations import Configurations, Tile, configurations
from lmfusion_kernels.triton.hybrid_attention_tiles import load_rows

INTERPRETED = not isinstance(load_rows, triton.runtime.JITFunction)
"""Whether the kernels are interpreted on the CPU."""

_INTERPRETED_DEVICE = (8, 2**20)  # processors and bytes of L2 cache that the interpreter pretends to have


def key_descriptors(k: Tensor, v: Tensor, tile: Tile) -> tuple[TensorDescriptor | None, ...]:
    """Descriptors of k and v for tiles without a mask, then of both for border tiles."""
    if not tile.descriptors:
        return (None,) * 4
    return tuple(descriptor_of(x, rows) for rows in (tile.step, tile.border) for x in (k, v))


def descriptor_of(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of x [N, heads, D] as [N, all heads], whose tiles are `rows` rows of one head."""
    num_rows, num_heads, head_dim = x.shape
    width = (num_heads - 1) * x.stride(1) + head_dim
    return TensorDescriptor(x, [num_rows, width], [x.stride(0), 1], [rows, padded_dim(head_dim)])


def aligned(x: Tensor) -> Tensor:
    """x [N, heads, D], copied unless D is contiguous and rows and heads begin at multiples of 16 bytes."""
    step = 16 // x.element_size()
    if x.stride(2) == 1 and x.stride(0) % step == 0 and x.stride(1) % step == 0 and x.data_ptr() % 16 == 0:
        is_row_major = x.stride(0) >= x.stride(1) > 0 or x.shape[1] == 1
        if is_row_major and x.stride(0) > 0:
            return x
    return x.clone(memory_format=torch.contiguous_format)


def padded_dim(head_dim: int) -> int:
    """The head size of tiles: a power of two, and at least 16, as products need."""
    return max(16, triton.next_power_of_2(head_dim))


def strides(*tensors: Tensor) -> list[int]:
    """Strides of rows and of heads, tensor by tensor, in the order in which all kernels take them."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def launch_options(head_dim: int, tile: Tile) -> dict[str, int]:
    """Keyword arguments that the launches of all kernels with tiles have in common."""
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim(head_dim),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def query_tile_options(head_dim: int, tile: Tile) -> dict[str, int]:
    """Keyword arguments of the kernels whose programs own a tile of queries."""
    blocks = {"BLOCK_M": tile.block, "BLOCK_N": tile.step, "BORDER_N": tile.border}
    return launch_options(head_dim, tile) | blocks


def query_tile_counts(q: Tensor, k: Tensor, tile: Tile) -> tuple[int, int, int, int]:
    """The counts of these kernels: queries, query tiles, heads that run at the same time, query heads per key head."""
    group = q.shape[1] // k.shape[1]
    return q.shape[0], triton.cdiv(q.shape[0], tile.block), concurrent_heads(k, group), group


def concurrent_heads(k: Tensor, group: int) -> int:
    """How many query heads run at the same time: those of as many key-value heads as half of the L2 cache holds."""
    num_keys, num_kv_heads, head_dim = k.shape
    fitting = processors_and_l2_bytes(k.device)[1] // 2 // max(1, 2 * num_keys * head_dim * k.element_size())
    return group * max(n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and (n == 1 or n <= fitting))


@cache
def processors_and_l2_bytes(device: torch.device) -> tuple[int, int]:
    """Number of multiprocessors, and bytes of L2 cache."""
    if device.type != "cuda":
        return _INTERPRETED_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def default_configurations(q: Tensor) -> Configurations:
    """The launches of the table for q's head size, dtype and device."""
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (9, 0)
    return configurations(q.shape[2], q.element_size(), capability)


def check_rows(q: Tensor, k: Tensor, v: Tensor, vectors: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless the kernels can work on q, k, v and these vectors by query."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            "q must be [Nq, H, D], k and v both [Nk, H_kv, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"q, k and v must be of one dtype, float16, bfloat16 or float32, got {q.dtype}, {k.dtype} and {v.dtype}; "
            "cast them, or use backend='reference'"
        )
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q must have a multiple of the {k.shape[1]} heads of k and v, got {q.shape[1]}")
    if q.shape[2] % 8 or not 8 <= q.shape[2] <= 256:
        raise ValueError(
            f"the head size must be a multiple of 8 up to 256 for the Triton kernels, got {q.shape[2]}; pad q, k and v "
            "with zeros, or use backend='reference'"
        )
    if not q.device == k.device == v.device or (q.device.type != "cuda" and not INTERPRETED):
        raise ValueError(
            f"q, k and v must be on one CUDA device, got {q.device}, {k.device} and {v.device} (on the CPU the kernels "
            "run in an interpreter if TRITON_INTERPRET=1 is set before triton is imported)"
        )
    for name, vector in vectors.items():
        if vector is not None:
            check_vector(name, vector, q.shape[0], q.device)


def check_hidden(visible_end: Tensor | None, run_end: Tensor | None, k: Tensor) -> None:
    if (visible_end is None) != (run_end is None):
        raise ValueError(
            "visible_end and run_end must be given together or both be None, got only "
            + ("run_end" if visible_end is None else "visible_end")
        )
    if visible_end is not None and run_end is not None:
        check_vector("visible_end", visible_end, k.shape[0], k.device)
        check_vector("run_end", run_end, k.shape[0], k.device)


def check_vector(name: str, vector: Tensor, size: int, device: torch.device) -> None:
    fits = vector.shape == (size,) and vector.dtype == torch.int32 and vector.is_contiguous()
    if not fits or vector.device != device:
        raise ValueError(
            f"{name} must be a contiguous int32 vector with {size} entries on {device}, got {vector.dtype} "
            f"{tuple(vector.shape)} on {vector.device}"
        )

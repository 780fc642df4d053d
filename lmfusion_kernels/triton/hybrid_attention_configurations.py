"""A table of tiles, warps and pipeline stages of the attention kernels by device. Nothing is tuned at run time.

The entries follow the compiler's reports: the largest tiles that spill no register (with Triton 3.6 the forward for
heads of 256 spills a few) and fit into shared memory. They are untested on a GPU; `python -m benchmarks.tune_attention`
measures these and others on one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """The launch of one kernel."""

    block: int
    """Rows that a program owns: queries, or listed keys in the kernel of dk and dv."""
    step: int
    """Rows of the other side that it reads at a time."""
    border: int
    """Like `step`, for tiles that need a mask; divides `step`. Only used by the kernels with query tiles."""
    num_warps: int
    num_stages: int
    descriptors: bool = False
    """Whether tiles are loaded by TMA (compute capability 9.0 and later)."""


@dataclass(frozen=True)
class Configurations:
    """The launches of all kernels for one head size, dtype and device."""

    forward: Tile
    split: Tile
    """The forward for few queries, whose rows are at most `block` queries times heads of a group."""
    queries: Tile
    """dq."""
    keys: Tile
    """dk and dv."""


# float32 products do not use tensor cores, and every thread holds its own operands: the tiles are small.
_FLOAT32 = {
    64: Configurations(
        forward=Tile(32, 32, 32, 4, 2),
        split=Tile(16, 32, 32, 4, 2),
        queries=Tile(32, 32, 32, 4, 1),
        keys=Tile(32, 32, 32, 4, 2),
    ),
    128: Configurations(
        forward=Tile(32, 32, 32, 8, 2),
        split=Tile(16, 16, 16, 4, 2),
        queries=Tile(16, 32, 32, 4, 1),
        keys=Tile(32, 16, 16, 4, 1),
    ),
    256: Configurations(
        forward=Tile(16, 16, 16, 8, 1),
        split=Tile(16, 16, 16, 8, 1),
        queries=Tile(16, 16, 16, 4, 1),
        keys=Tile(16, 16, 16, 4, 1),
    ),
}

# Two bytes per element. On Hopper (wgmma) a group of four warps owns 64 rows, and tiles are loaded by TMA.
_HOPPER = {
    64: Configurations(
        forward=Tile(128, 128, 64, 8, 3, descriptors=True),
        split=Tile(64, 64, 64, 4, 3, descriptors=True),
        queries=Tile(128, 64, 64, 8, 3, descriptors=True),
        keys=Tile(128, 64, 64, 8, 3, descriptors=True),
    ),
    128: Configurations(
        forward=Tile(128, 128, 64, 8, 2, descriptors=True),
        split=Tile(64, 64, 64, 4, 3, descriptors=True),
        queries=Tile(128, 64, 64, 8, 2, descriptors=True),
        keys=Tile(128, 32, 32, 8, 3, descriptors=True),  # with 64 queries at a time it spills some registers
    ),
    256: Configurations(
        forward=Tile(128, 64, 16, 8, 2, descriptors=True),
        split=Tile(64, 32, 32, 8, 2, descriptors=True),
        queries=Tile(64, 32, 16, 8, 2, descriptors=True),
        keys=Tile(64, 32, 32, 8, 2, descriptors=True),
    ),
}

# Other devices load tiles by cp.async. These need at most 99 KiB of shared memory, all that small devices of compute
# capability 8 have.
_OTHER = {
    64: Configurations(
        forward=Tile(128, 64, 32, 8, 3),
        split=Tile(64, 64, 64, 4, 3),
        queries=Tile(128, 64, 32, 8, 2),
        keys=Tile(128, 32, 32, 8, 2),
    ),
    128: Configurations(
        forward=Tile(128, 64, 16, 8, 2),
        split=Tile(64, 32, 32, 4, 3),
        queries=Tile(64, 32, 32, 4, 2),
        keys=Tile(64, 32, 32, 4, 2),
    ),
    256: Configurations(
        forward=Tile(64, 32, 16, 8, 2),
        split=Tile(32, 32, 32, 4, 1),
        queries=Tile(64, 16, 16, 8, 1),
        keys=Tile(32, 32, 32, 8, 1),
    ),
}


def configurations(head_dim: int, element_size: int, capability: tuple[int, int]) -> Configurations:
    """The launches of all kernels for D = head_dim, elements of 2 or 4 bytes, and a CUDA compute capability."""
    size = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    if element_size == 4:
        return _FLOAT32[size]
    return _HOPPER[size] if capability[0] == 9 else _OTHER[size]

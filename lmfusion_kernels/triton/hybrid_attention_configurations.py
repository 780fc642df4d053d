"""Which tiles, warps and pipeline stages do the attention kernels use on which device? A table; nothing is tuned at run
time.

Chosen from what the compiler reports: the largest tiles that spill no register (with Triton 3.6 the forward for heads
of 256 spills a few) and fit into shared memory. Untested on a GPU: `python -m benchmarks.tune_attention` measures these
and others there.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched."""

    block: int
    """Rows that a program owns: queries, or listed keys in the kernel of dk and dv."""
    step: int
    """Rows of the other side that it reads at a time."""
    border: int
    """As `step`, where the mask has to be looked at; divides it. Only the kernels with query tiles have it."""
    num_warps: int
    num_stages: int
    descriptors: bool = False
    """Whether tiles come by TMA (compute capability 9.0 and later)."""


@dataclass(frozen=True)
class Configurations:
    forward: Tile
    split: Tile
    """The forward for few queries, whose rows are at most `block` queries times heads of a group."""
    queries: Tile
    """dq."""
    keys: Tile
    """dk and dv."""


# Products of float32 are no tensor core's work; small tiles, as every thread holds its own operands.
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

# Two bytes an element. On Hopper (wgmma) a group of four warps owns 64 rows, and tiles come by TMA.
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
        keys=Tile(128, 32, 32, 8, 3, descriptors=True),  # 64 queries at a time make it spill some registers
    ),
    256: Configurations(
        forward=Tile(128, 64, 16, 8, 2, descriptors=True),
        split=Tile(64, 32, 32, 8, 2, descriptors=True),
        queries=Tile(64, 32, 16, 8, 2, descriptors=True),
        keys=Tile(64, 32, 32, 8, 2, descriptors=True),
    ),
}

# Others: tiles by cp.async. 99 KiB of shared memory are enough, as small devices of compute capability 8 have no more.
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

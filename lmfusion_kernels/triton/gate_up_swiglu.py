"""Gate and up projection of both towers with SwiGLU in the epilogue: one persistent Triton GEMM for sm_90.

silu(x @ gate^T) * (x @ up^T) of a tile of hidden columns needs one tile of gate rows and one of up rows, so a program
keeps two accumulators and never writes gate and up unless the backward wants them. Tiles of both towers form one grid:
the row split is known on the host, so the image tiles follow the text tiles.

The gain: with n = 8192 rows, d = 4096, I = 14336 in bfloat16, two cuBLAS calls would take 2436 us at an assumed
790 TFLOP/s, and a SwiGLU pass after them reads gate and up (470 MB) and writes the product (235 MB). The epilogue
saves the reading, 470 MB or 109 us at an assumed 4.3 TB/s. In inference it also saves the writing of gate and up,
another 470 MB, which the GEMM mostly hides. So this kernel breaks even in training at 2436 / (2436 + 109) = 96 % of
the rate of cuBLAS, and not far below that in inference. This is unmeasured (untested on a GPU), so two calls stay the
default; see `lmfusion_kernels.ops.gate_up_swiglu`.

Tiles are read and written through tensor descriptors, by the bulk copy engine, which needs widths in multiples of 16
bytes and does not exist before sm_90. float32 is multiplied as IEEE float32, for the interpreter.
"""

# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

GROUP_ROWS = 8
"""Row tiles that pass over the columns together, so that a tile of weights is read once from memory, then from L2."""


@dataclass(frozen=True)
class Configuration:
    """A tile: rows × columns of the hidden activations, with `depth` of the inner dimension at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def configurations(element_size: int) -> list[Configuration]:
    """The tiles for elements of this size in bytes; the first one is used."""
    depth = 128 // element_size  # one swizzled row of shared memory
    # Smaller tiles need more bandwidth than the L2 cache has: 128 rows with 2 x 128 columns do 85 FLOPs per byte.
    return [Configuration(128, 128, depth, 8, 4), Configuration(128, 128, depth, 8, 3)]


@triton.jit
def _tower_tiles(
    x, gate_weight, up_weight, hidden, gate, up, num_rows, num_columns, width, num_constant, first_tile,
    KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute every num_programs-th tile of one tower from first_tile on.

    Returns the program's first tile in the next tower: its next tile here, counted from the end of this tower.
    """
    num_row_tiles, num_column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    num_tiles = num_row_tiles * num_column_tiles
    # Flattening the loops (flatten=True) would load the next tile during the epilogue, but then ptxas makes each wgmma
    # wait for the previous one.
    for tile in tl.range(first_tile, num_tiles, tl.num_programs(0)):
        group = tile // (GROUP * num_column_tiles)
        group_rows = min(num_row_tiles - group * GROUP, GROUP)
        in_group = tile % (GROUP * num_column_tiles)
        row = (group * GROUP + in_group % group_rows) * ROWS
        column = (in_group // group_rows) * COLUMNS
        gate_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        up_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in tl.range(0, width, DEPTH):
            x_tile = x.load([row, depth])
            gate_sum = tl.dot(x_tile, gate_weight.load([column, depth]).T, gate_sum, input_precision="ieee")
            up_sum = tl.dot(x_tile, up_weight.load([column, depth]).T, up_sum, input_precision="ieee")
        # Round first, because the backward recomputes the product from the rounded gate and up.
        gate_tile, up_tile = gate_sum.to(hidden.dtype), up_sum.to(hidden.dtype)
        wide = gate_tile.to(tl.float32)
        hidden.store([row, column], (wide / (1 + tl.exp(-wide)) * up_tile.to(tl.float32)).to(hidden.dtype))
        if KEEP:  # noqa: SIM102 - decided at compile time, unlike the next condition
            if min(row + ROWS, num_rows) > num_constant:  # of a tile across the border, negative rows are not stored
                gate.store([row - num_constant, column], gate_tile)
                up.store([row - num_constant, column], up_tile)
    num_programs = tl.num_programs(0)
    num_own = tl.cdiv(tl.maximum(num_tiles - first_tile, 0), num_programs)
    return first_tile + num_own * num_programs - num_tiles


@triton.jit(do_not_specialize=["text_rows", "image_rows", "num_constant"])
def gate_up_swiglu_kernel(
    text_x, text_gate_weight, text_up_weight, text_hidden, text_gate, text_up, text_rows, text_columns, text_width,
    image_x, image_gate_weight, image_up_weight, image_hidden, image_gate, image_up, image_rows, image_columns,
    image_width, num_constant,
    KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    first = _tower_tiles(
        text_x, text_gate_weight, text_up_weight, text_hidden, text_gate, text_up, text_rows, text_columns, text_width,
        num_constant, tl.program_id(0), KEEP, ROWS, COLUMNS, DEPTH, GROUP,
    )  # fmt: skip
    _tower_tiles(
        image_x, image_gate_weight, image_up_weight, image_hidden, image_gate, image_up, image_rows, image_columns,
        image_width, 0, first, KEEP, ROWS, COLUMNS, DEPTH, GROUP,
    )  # fmt: skip


def forward(
    x: Sequence[Tensor],
    weights: Sequence[Tensor],
    num_constant: int,
    keep: bool,
    configuration: Configuration | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the hidden activations of both towers, and with `keep` gate and up of the rows from num_constant on.

    x: rows [n, d] of the text and of the image tower, the last dimension contiguous; weights: their [2 I, d], gate then
    up; bfloat16 or float16 on CUDA, float32 or float16 in the interpreter. d and I are multiples of 16 bytes. Returns
    ([n, I] per tower, [n, 2 I] per tower or []). Runs on the current stream, without waiting for the device; n may be
    0."""
    x, weights = [rows.contiguous() for rows in x], [weight.contiguous() for weight in weights]
    hidden = [rows.new_empty(rows.shape[0], w.shape[0] // 2) for rows, w in zip(x, weights, strict=True)]
    gate_up = [
        rows.new_empty(rows.shape[0] - skipped, w.shape[0])
        for rows, w, skipped in zip(x, weights, (num_constant, 0), strict=True)
    ]
    if not keep:
        gate_up = []
    num_rows = [rows.shape[0] for rows in x]
    if not any(num_rows):
        return hidden, gate_up
    c = configuration or configurations(x[0].element_size())[0]
    arguments: list[object] = []
    for tower in (0, 1):
        # A descriptor cannot have zero rows. An empty tower has no tiles, so it may use any descriptor.
        used = tower if num_rows[tower] else 1 - tower
        width, columns = x[used].shape[1], hidden[used].shape[1]
        tiles = [_tiles(x[used], c.rows, c.depth)]
        tiles += [_tiles(half, c.columns, c.depth) for half in weights[used].split(columns)]
        tiles += [_tiles(hidden[used], c.rows, c.columns)]
        if keep and gate_up[used].shape[0]:
            tiles += [_tiles(half, c.rows, c.columns) for half in gate_up[used].split(columns, dim=1)]
        else:
            tiles += [tiles[-1], tiles[-1]]
        arguments += [*tiles, num_rows[tower], columns, width]
    programs = min(_num_multiprocessors(x[0].device), sum(_num_tiles(h, c) for h in hidden))
    with torch.cuda.device(x[0].device) if x[0].is_cuda else nullcontext():
        gate_up_swiglu_kernel[(programs,)](
            *arguments, num_constant, KEEP=keep, ROWS=c.rows, COLUMNS=c.columns, DEPTH=c.depth, GROUP=GROUP_ROWS,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return hidden, gate_up


def _tiles(rows: Tensor, num_rows: int, num_columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(rows, [num_rows, num_columns])


def _num_tiles(hidden: Tensor, configuration: Configuration) -> int:
    return -(-hidden.shape[0] // configuration.rows) * -(-hidden.shape[1] // configuration.columns)


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3

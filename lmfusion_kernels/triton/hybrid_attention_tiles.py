"""Which rows, keys and heads does a program of the attention kernels work on? Device functions that all of them share.

A tile of queries sees the keys [key_start[first row], key_end[last row]). All its rows see the *interior*,
[key_start[last row], key_end[first row]), which needs no mask; where that is empty or ends, *border* tiles are masked
row by row. Documents in a key-value cache leave gaps between their keys, which hold anything: a *run* is a stretch of
keys without a gap, and only runs are read.

Hidden spans cut the keys into *stretches* (a hidden segment, or what is visible between two within a document). All
keys of one end for queries at one visible_end, so a stretch is skipped, or has an interior and a border of its own.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

_LARGEST = tl.constexpr(2**31 - 1)


@triton.jit
def tile_and_head(num_tiles, heads_together):
    """Tiles from the last to the first, since the last see most keys; `heads_together` heads side by side, so that
    their keys and values stay in the L2 cache."""
    program = tl.program_id(0)
    section = program // (num_tiles * heads_together)
    within = program % (num_tiles * heads_together)
    return num_tiles - 1 - within // heads_together, section * heads_together + within % heads_together


@triton.jit
def load_rows(
    base, stride, start, end, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, MASK: tl.constexpr
):
    """Rows [start, start + ROWS) of one head as [ROWS, PADDED]; with MASK, zeros from row `end` on."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    pointers = base + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    if MASK:
        if DIM < PADDED:
            return tl.load(pointers, mask=(start + row < end)[:, None] & (column < DIM)[None, :], other=0.0)
        return tl.load(pointers, mask=(start + row < end)[:, None], other=0.0)
    if DIM < PADDED:
        return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def gather_rows(base, stride, rows, DIM: tl.constexpr, PADDED: tl.constexpr):
    """The rows of one head that `rows` lists, as [len(rows), PADDED]."""
    column = tl.arange(0, PADDED)
    pointers = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    if DIM < PADDED:
        return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, stride, rows, wanted, value, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Row r of `value` [len(rows), PADDED] to row rows[r], where `wanted`."""
    column = tl.arange(0, PADDED)
    pointers = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    mask = wanted[:, None]
    if DIM < PADDED:
        mask = mask & (column < DIM)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def interior(low, shared_low, shared_high, BLOCK: tl.constexpr):
    """Tiles of BLOCK from `low` on that lie within [shared_low, shared_high): (start, end), equal if there are none."""
    start = low + tl.cdiv(shared_low - low, BLOCK) * BLOCK
    return start, start + tl.maximum(shared_high - start, 0) // BLOCK * BLOCK


@triton.jit
def next_stretch(visible_end, run_end, done, high, first_row):
    """The stretch from key `done` on, which ends at `high` at the latest: (end, end of what a tile of queries from
    first_row on reads of it, the first query that does not see it)."""
    end = tl.minimum(tl.load(run_end + done), high)
    seen_before = tl.load(visible_end + done)
    return end, tl.where(seen_before > first_row, end, done), seen_before


@triton.jit
def next_run(key_start, key_end, rows, last_row, done):
    """The first stretch of keys, all seen by some of `rows` (ascending, not above last_row), that ends after `done`.

    A run goes on while the next query's range begins within or right behind those before it.
    """
    start = tl.load(key_start + rows)
    end = tl.load(key_end + rows)
    following = tl.load(key_start + tl.minimum(rows + 1, last_row))
    run_ends = (following > end) | (rows >= last_row)
    low = tl.min(tl.where(end > done, start, _LARGEST), axis=0)
    high = tl.min(tl.where((end > done) & run_ends, end, _LARGEST), axis=0)
    return low, high

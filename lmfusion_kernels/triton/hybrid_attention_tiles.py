"""Device functions that the attention kernels share: the rows, keys and heads that a program works on.

A tile of queries sees the keys [key_start[first row], key_end[last row]). All its rows see the *interior*,
[key_start[last row], key_end[first row]), which needs no mask. The keys around it are read in *border* tiles, masked
row by row. In a key-value cache there are gaps between the keys of documents, with arbitrary values: a *run* is a range
of keys without a gap, and only runs are read.

Hidden spans split the keys into *sections* (a hidden segment, or the visible keys between two within a document). All
keys of a section have one visible_end, so a section is skipped, or it has an interior and a border of its own.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

_LARGEST = tl.constexpr(2**31 - 1)


@triton.jit
def tile_and_head(num_tiles, concurrent_heads):
    """The query tile and head of a program.

    Tiles run from the last to the first, because the last see most keys, and `concurrent_heads` heads run at the same
    time, so that their keys and values stay in the L2 cache.
    """
    program = tl.program_id(0)
    group = program // (num_tiles * concurrent_heads)
    within = program % (num_tiles * concurrent_heads)
    return num_tiles - 1 - within // concurrent_heads, group * concurrent_heads + within % concurrent_heads


@triton.jit
def load_rows(
    base, stride, start, end, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, MASK: tl.constexpr
):
    """Load rows [start, start + ROWS) of one head as [ROWS, PADDED]; with MASK, zeros from row `end` on."""
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
    """Load the listed rows of one head as [len(rows), PADDED]."""
    column = tl.arange(0, PADDED)
    pointers = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    if DIM < PADDED:
        return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, stride, rows, wanted, value, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Store row r of `value` [len(rows), PADDED] to row rows[r] if wanted[r]."""
    column = tl.arange(0, PADDED)
    pointers = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    mask = wanted[:, None]
    if DIM < PADDED:
        mask = mask & (column < DIM)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def interior(low, shared_low, shared_high, BLOCK: tl.constexpr):
    """The tiles of BLOCK, counted from `low`, within [shared_low, shared_high), as (start, end); equal if there are
    none."""
    start = low + tl.cdiv(shared_low - low, BLOCK) * BLOCK
    return start, start + tl.maximum(shared_high - start, 0) // BLOCK * BLOCK


@triton.jit
def next_section(visible_end, run_end, done, high, first_row):
    """The section from key `done` on, which ends at `high` at the latest.

    Returns (its end, the end of the keys that a tile of queries from first_row on reads, the first query that does not
    see it).
    """
    end = tl.minimum(tl.load(run_end + done), high)
    hidden_from = tl.load(visible_end + done)
    return end, tl.where(hidden_from > first_row, end, done), hidden_from


@triton.jit
def next_run(key_start, key_end, rows, last_row, done):
    """The first run of keys, all seen by some of `rows` (ascending, at most last_row), that ends after `done`.

    A run continues as long as the range of the next query begins within or right after the earlier ranges.
    """
    start = tl.load(key_start + rows)
    end = tl.load(key_end + rows)
    following = tl.load(key_start + tl.minimum(rows + 1, last_row))
    run_ends = (following > end) | (rows >= last_row)
    low = tl.min(tl.where(end > done, start, _LARGEST), axis=0)
    high = tl.min(tl.where((end > done) & run_ends, end, _LARGEST), axis=0)
    return low, high

"""Block lists of the mask: which tiles a kernel has to visit, and which of them are visible as a whole.

A block is `size` queries by `size` keys. Because the ranges of keys do not decrease, the blocks that a block of queries
sees are consecutive, and so are the blocks that it sees as a whole. (If ranges leave gaps, as those of constant tokens
do, blocks in a gap are listed too, and masked as a whole.) Everything here runs on the device without a host sync. The
lists have [blocks of queries, blocks of keys] entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class BlockLists(NamedTuple):
    """For each block of rows, the blocks of columns: partly visible ones, and blocks that are visible as a whole."""

    num_partial: Tensor
    """int32 [row blocks]"""
    partial: Tensor
    """int32 [row blocks, column blocks]: the first num_partial entries of a row are the blocks, ascending."""
    num_full: Tensor
    full: Tensor


def block_lists(start: Tensor, end: Tensor, num_columns: int, size: int, any_full: bool = True) -> BlockLists:
    """The blocks of the mask in which row i sees the columns [start[i], end[i]), both non-decreasing, int32 [n].

    A block that is cut off by the last row or column is never listed as full: kernels mask it anyway. Without any_full
    no block is, for masks that leave out more than the ranges do.
    """
    num_rows = start.shape[0]
    row_blocks, column_blocks = -(-num_rows // size), -(-num_columns // size)
    first = torch.arange(0, num_rows, size, device=start.device, dtype=torch.int32)
    last = torch.clamp(first + (size - 1), max=num_rows - 1)
    lowest, highest = start.index_select(0, first), end.index_select(0, last)
    all_from, all_to = start.index_select(0, last), end.index_select(0, first)  # visible to every row of the block

    begin = lowest // size
    stop = torch.maximum(begin, (highest + (size - 1)) // size)
    stop = torch.where(highest > lowest, stop, begin)
    full_begin = torch.clamp((all_from + (size - 1)) // size, min=0)
    full_stop = torch.maximum(full_begin, all_to // size)
    full_stop = torch.where(first + size <= num_rows, full_stop, full_begin) if any_full else full_begin
    full_begin, full_stop = torch.clamp(full_begin, max=stop), torch.clamp(full_stop, max=stop)

    entry = torch.arange(column_blocks, device=start.device, dtype=torch.int32).expand(row_blocks, column_blocks)
    num_full = full_stop - full_begin
    full = entry + full_begin.unsqueeze(1)
    # Partial blocks lie before the full ones and after them: entries past those before skip the full ones.
    partial = entry + begin.unsqueeze(1)
    partial = torch.where(partial >= full_begin.unsqueeze(1), partial + num_full.unsqueeze(1), partial)
    num_partial = stop - begin - num_full
    limit = column_blocks - 1
    return BlockLists(num_partial, torch.clamp(partial, max=limit), num_full, torch.clamp(full, max=limit))

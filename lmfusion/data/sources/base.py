"""What data sources share: their length, their blocks, and which block a sample lies in."""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple


class SingleBlock:
    """Mixin of a source whose samples are equally cheap to read in any order. The source defines `__len__`."""

    @property
    def blocks(self) -> list[int]:
        return [len(self)]

    def __len__(self) -> int:
        raise NotImplementedError


class BlockPlace(NamedTuple):
    """Where a sample lies."""

    block: int
    offset: int
    """Of the sample in its block."""


class Blocks:
    """Base of a source that consists of files or row groups, which are its blocks."""

    blocks: list[int]
    """Samples of each block, the damaged ones included."""

    def set_blocks(self, sizes: Sequence[int]) -> None:
        """Call this in `__init__`, once the sizes are known."""
        self.blocks = list(sizes)
        self._starts = [0, *itertools.accumulate(self.blocks)]

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, index: int) -> BlockPlace:
        """The place of sample `index`. Raises IndexError for an index outside the source."""
        if not 0 <= index < len(self):
            raise IndexError(f"the index of a sample must be in [0, {len(self)}), got {index}")
        block = bisect.bisect_right(self._starts, index) - 1
        return BlockPlace(block, index - self._starts[block])

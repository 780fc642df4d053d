"""Shuffles the samples of a source, and splits them into train and test: pure functions that keep no state."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lmfusion.data.config import SPLITS
from lmfusion.utils.randomness import generator


class Permutation:
    """A shuffle of range(size): `permutation[position]` is the index at that position.

    A four-round Feistel network over the next power of four; an index outside the range is mapped again until it falls
    inside. A pure function of (size, seed, epoch, name).
    """

    _NUM_ROUNDS = 4

    def __init__(self, size: int, seed: int, epoch: int, name: str = "") -> None:
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        self._keys = generator(seed, epoch, name, "order").integers(1 << 63, size=self._NUM_ROUNDS).astype(np.uint64)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        return int(self.take(np.array([position]))[0])

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The indices (int64 [n]) at `positions` (integers [n]). Raises IndexError for one outside the range."""
        outside = (positions < 0) | (positions >= self.size)
        if outside.any():
            raise IndexError(f"positions must be in [0, {self.size}), got {positions[outside][0]}")
        indices = self._round_trip(positions.astype(np.uint64))
        while (walking := np.flatnonzero(indices >= self.size)).size:
            indices[walking] = self._round_trip(indices[walking])
        return indices.astype(np.int64)

    def _round_trip(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half_bits, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


class BlockPermutation:
    """A shuffle of a source in two levels: its blocks, then the samples within each group of `group_size` blocks.

    Reading it from position to position touches one group of blocks at a time. A pure function of its arguments.
    """

    def __init__(self, blocks: np.ndarray, group_size: int, seed: int, epoch: int, name: str = "") -> None:
        self._seed, self._epoch, self._name = seed, epoch, name
        order = Permutation(len(blocks), seed, epoch, f"{name} blocks").take(np.arange(len(blocks)))
        ends = np.cumsum(blocks[order])
        self._block_ends = ends  # in the order in which blocks are read
        # From places in that order to indices of the source
        self._shift = (np.cumsum(blocks) - blocks)[order] - (ends - blocks[order])
        self._group_ends = np.append(ends[group_size - 1 : -1 : group_size], ends[-1])

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The indices (int64 [n]) at `positions` (integers [n])."""
        places = np.empty(len(positions), np.int64)
        groups = np.searchsorted(self._group_ends, positions, "right")
        for group in np.unique(groups).tolist():
            start = int(self._group_ends[group - 1]) if group else 0
            size = int(self._group_ends[group]) - start
            here = groups == group
            shuffle = Permutation(size, self._seed, self._epoch, f"{self._name} group {group}")
            places[here] = start + shuffle.take(positions[here] - start)
        return places + self._shift[np.searchsorted(self._block_ends, places, "right")]


class SourceOrder:
    """The endless order of the samples of one source: all of them, in a new shuffle each epoch.

    With `shuffle_blocks` the shuffle has two levels, see `BlockPermutation`; without, it is one over all samples.
    """

    def __init__(self, blocks: Sequence[int], shuffle_blocks: int | None, seed: int, name: str = "") -> None:
        sizes = np.asarray(blocks, np.int64)
        self.size = int(sizes.sum())

        def shuffle(epoch: int) -> Permutation | BlockPermutation:
            if shuffle_blocks is None or shuffle_blocks >= len(sizes):
                return Permutation(self.size, seed, epoch, name)
            return BlockPermutation(sizes, shuffle_blocks, seed, epoch, name)

        self._shuffle = lru_cache(maxsize=2)(shuffle)

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and indices (int64 [n]) at `positions` (integers [n], 0 or more) of the endless order."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.size)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._shuffle(epoch).take(places[here])
        return epochs, indices


def split_indices(size: int, split: str, held_out: float) -> list[int]:
    """The indices of range(size) in "train" or "test". A pure function of its arguments.

    held_out: the share of indices in "test". Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    is_held_out = Permutation(size, seed=0, epoch=0).take(np.arange(size)) < round(size * held_out)
    return np.flatnonzero(is_held_out == (split == "test")).tolist()


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: 64 bits in, 64 well-mixed bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""Where does chance come from? From counters: every draw is a pure function of what it is for.

No global generator is read or advanced, so the number of workers, the size of micro-batches and a restart cannot change
what a sample sees.
"""

import hashlib

import numpy as np


def generator(seed: int, epoch: int, sample_id: str, purpose: str) -> np.random.Generator:
    """The private generator of one purpose ("noise", "timestep", ...) of one sample in one epoch."""
    key = hashlib.blake2b(repr((seed, epoch, sample_id, purpose)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))


class Permutation:
    """A shuffle of range(size) that needs no memory: `permutation[position]` is the index at that position.

    A four-round Feistel network over the next even power of two, walked again while it points outside the range. A pure
    function of (size, seed, epoch).
    """

    _NUM_ROUNDS = 4

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._keys = [int(key) for key in generator(seed, epoch, "", "order").integers(1 << 63, size=self._NUM_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside a permutation of {self.size}")
        index = position
        while True:
            left, right = index >> self._half_bits, index & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & self._mask)
            index = (left << self._half_bits) | right
            if index < self.size:
                return index


def _mix(x: int) -> int:
    """The finaliser of splitmix64: 64 bits in, 64 well-mixed bits out."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)

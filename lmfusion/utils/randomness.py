"""Counter-based random numbers: each is a pure function of seed, epoch, sample and purpose.

No global generator is read or advanced, so the number of workers and a restart do not change the random
numbers of a sample.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def generator(seed: int, epoch: int, sample_id: str, purpose: str) -> np.random.Generator:
    """The private generator of one purpose ("document", "noise", ...) of one sample in one epoch."""
    key = hashlib.blake2b(repr((seed, epoch, sample_id, purpose)).encode(), digest_size=16).digest()
    # Philox accepts any ISeedSequence, though numpy's annotation does not say so
    return np.random.Generator(np.random.Philox(_Key(np.frombuffer(key, np.uint64))))  # type: ignore[arg-type]


class _Key(ISeedSequence):
    """Passes Philox its key. With `key=`, Philox would first read entropy from the system, which is slow."""

    def __init__(self, key: np.ndarray) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self._key

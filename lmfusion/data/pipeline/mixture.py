"""Mixes sources by their weights. The sample at a position is a pure function of it: the state is one number.

Positions come in periods of 1,000. In each period every source has a fixed quota by its weight, in shuffled order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from lmfusion.data.pipeline.order import Permutation, SourceOrder

PERIOD = 1000


@dataclass(frozen=True, slots=True)
class SampleRef:
    """The sample `index` of a source, in one of the source's epochs."""

    source: int
    epoch: int
    index: int


class Mixture:
    """The endless sequence of samples from several sources, each in its own order and epochs.

    Raises ValueError for a weight so small that a source has no place in a period.
    """

    def __init__(self, orders: Sequence[SourceOrder], weights: Sequence[float], seed: int) -> None:
        self._orders = orders
        self.quotas = quotas(weights)
        """Positions of each source in a period."""
        by_source = np.repeat(np.arange(len(orders)), self.quotas)

        def period(number: int) -> tuple[np.ndarray, np.ndarray]:
            """Of each position in a period: its source, and how many samples of that source came before it."""
            sources = by_source
            if len(orders) > 1:
                sources = by_source[Permutation(PERIOD, seed, number, "mixture").take(np.arange(PERIOD))]
            ranks = np.empty(PERIOD, np.int64)
            for source, quota in enumerate(self.quotas):
                ranks[sources == source] = np.arange(quota)
            return sources, ranks

        self._period = lru_cache(maxsize=4)(period)

    def samples(self, positions: range) -> list[SampleRef]:
        """The samples at consecutive positions, 0 or more, of the sequence."""
        at = np.arange(positions.start, positions.stop)
        numbers, places = np.divmod(at, PERIOD)
        sources, ranks = np.empty_like(at), np.empty_like(at)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            of_place, rank_of_place = self._period(number)
            sources[here], ranks[here] = of_place[places[here]], rank_of_place[places[here]]
        epochs, indices = np.empty_like(at), np.empty_like(at)
        for source in np.unique(sources).tolist():
            here = sources == source
            epochs[here], indices[here] = self._orders[source].take(numbers[here] * self.quotas[source] + ranks[here])
        return [SampleRef(*ref) for ref in zip(sources.tolist(), epochs.tolist(), indices.tolist(), strict=True)]


def quotas(weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to PERIOD, in proportion to the weights by largest remainder.

    Raises ValueError for a weight whose share is too small for one place.
    """
    total = sum(map(Fraction, weights))  # exact, so that every machine rounds alike
    shares = [Fraction(weight) / total * PERIOD for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: PERIOD - sum(counts)]:
        counts[i] += 1
    for i, count in enumerate(counts):
        if count == 0:
            raise ValueError(
                f"the weight of data.sources[{i}] must be at least 1 in {PERIOD} samples, got {weights[i]}; raise it, "
                "or leave the source out"
            )
    return counts

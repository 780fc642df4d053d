"""How sure is a score? 95 % percentile intervals of the bootstrap (Efron and Tibshirani 1993, chapter 13)."""

from collections.abc import Callable

import numpy as np

LEVEL = 0.95
PERCENTILES = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)

Statistic = Callable[[np.ndarray], float]


def mean(values: np.ndarray) -> float:
    """Mean over all entries of `values`."""
    return float(np.mean(values))


def bootstrap(
    values: np.ndarray, statistic: Statistic = mean, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(low, high): where `statistic` of another sample of the same size would lie 95 times of 100.

    values: [n, ...], one entry of the first axis a sample; entries are drawn with replacement, `num_resamples` times.
    statistic: of an array like `values`; one number. It should not lean on entries being different from each other, as
    distances between distributions do: those of resamples are all too large (see `feature_distances`).
    The same seed gives the same interval. A single sample gives an interval without width.

    Raises ValueError where there are no values or no resamples, or where a statistic is not finite.
    """
    values = np.asarray(values)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f"values have shape {values.shape}; a bootstrap needs one sample or more along the first axis")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; it must be at least 1, and 1000 is usual")
    generator = np.random.default_rng(seed)
    count = len(values)
    statistics = np.array([statistic(values[generator.integers(count, size=count)]) for _ in range(num_resamples)])
    if not np.isfinite(statistics).all():
        raise ValueError(
            "the statistic of a resample is not finite; leave out the samples without a value before the bootstrap"
        )
    low, high = np.percentile(statistics, PERCENTILES)
    return float(low), float(high)

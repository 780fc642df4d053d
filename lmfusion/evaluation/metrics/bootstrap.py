"""95 % percentile intervals of the bootstrap (Efron and Tibshirani 1993, chapter 13)."""

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
    """(low, high): the interval that `statistic` of another sample of the same size is in 95 times out of 100.

    values: [n, ...], one sample per entry of the first axis. Each of `num_resamples` resamples takes n entries with
    replacement. statistic: maps an array like `values` to one number. It must not rely on entries being different from
    each other, as distances between distributions do: these are too large for every resample (see `feature_distances`).
    The same seed gives the same interval. A single sample gives an interval of width 0.

    Raises ValueError for no values or no resamples, and if a statistic is not finite.
    """
    values = np.asarray(values)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f"values must have at least one sample along the first axis, got shape {values.shape}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, and is usually 1000, got {num_resamples}")
    generator = np.random.default_rng(seed)
    count = len(values)
    statistics = np.array([statistic(values[generator.integers(count, size=count)]) for _ in range(num_resamples)])
    if not np.isfinite(statistics).all():
        raise ValueError(
            "statistics of resamples must be finite, got nan or infinity; leave out samples without a value"
        )
    low, high = np.percentile(statistics, PERCENTILES)
    return float(low), float(high)

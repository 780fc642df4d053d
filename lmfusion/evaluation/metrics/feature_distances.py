"""Distances between two sets of images through the features of a network: Frechet (FID) and kernel (KID).

Features are arrays [n, d] with a row per image (see `lmfusion.evaluation.metrics.extractors`). Computations are in
float64.

| distance | between | with n images |
| --- | --- | --- |
| Frechet (Heusel et al. 2017) | normal distributions of the same means and covariances | too large by about 1/n |
| kernel, KID (Binkowski et al. 2018) | the distributions: MMD squared, cubic kernel | unbiased, may be below 0 |

Frechet distances can be compared only at the same n. A Frechet distance is called FID only for features of the
Inception network that FID was defined with. It has no bootstrap interval: resamples contain images twice, so they span
fewer directions, and their distances are all larger. The interval of the kernel distance comes from the spread of its
subsets, see `lmfusion.evaluation.suites.images.distances`.
"""

import numpy as np

BLOCK = 2048
"""Rows of a kernel matrix that are computed at a time."""


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)) of features [n, d] and [m, d], C the covariances.

    With centred features X_a = Q_a R_a, and C_a = X_a^T X_a / (n - 1), the trace of the root is the sum of the singular
    values of R_a R_b^T, divided by the root of (n - 1)(m - 1). So this needs neither covariances nor a matrix root.
    Both would lose half of the digits for singular covariances, which they are for n <= d.

    Raises ValueError for arrays of other shapes, fewer than two rows, and values that are not finite.
    """
    a, b = _checked(a, b)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    factors = []
    for features, mean in ((a, mean_a), (b, mean_b)):
        centred = (features - mean) / np.sqrt(len(features) - 1)
        factors.append(np.asarray(np.linalg.qr(centred, mode="r")))
    of_means = np.square(mean_a - mean_b).sum()
    of_covariances = sum(np.square(factor).sum() for factor in factors)
    root = np.linalg.norm(factors[0] @ factors[1].T, ord="nuc")
    # The exact trace is never negative, but rounding can make it so
    return float(of_means + max(of_covariances - 2 * root, 0.0))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased MMD^2 between all features [n, d] and [m, d], with the kernel (x . y / d + 1)^3.

    Time is proportional to (n + m)^2 d; use `kernel_distances_of_subsets` for many images. Raises what
    `frechet_distance` raises.
    """
    a, b = _checked(a, b)
    n, m = len(a), len(b)
    within_a = (_kernel_sum(a, a) - _kernel_diagonal(a)) / (n * (n - 1))
    within_b = (_kernel_sum(b, b) - _kernel_diagonal(b)) / (m * (m - 1))
    return within_a + within_b - 2 * _kernel_sum(a, b) / (n * m)


def kernel_distances_of_subsets(
    a: np.ndarray, b: np.ndarray, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> np.ndarray:
    """`kernel_distance` between random subsets of each side, float64 [num_subsets]. Published KIDs are their mean.

    subset_size: rows from each side, without replacement; at most as many as either side has.
    Raises ValueError for a size out of range, and what `frechet_distance` raises.
    """
    a, b = _checked(a, b)
    largest = min(len(a), len(b))
    if not 2 <= subset_size <= largest:
        raise ValueError(f"subset_size must be 2 to {largest} with {len(a)} and {len(b)} images, got {subset_size}")
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1, got {num_subsets}")
    generator = np.random.default_rng(seed)

    def subset(features: np.ndarray) -> np.ndarray:
        rows: np.ndarray = features[generator.choice(len(features), subset_size, replace=False)]
        return rows

    return np.array([kernel_distance(subset(a), subset(b)) for _ in range(num_subsets)])


def _kernel(products: np.ndarray, width: int) -> np.ndarray:
    root: np.ndarray = products / width + 1
    cube: np.ndarray = root * root * root
    return cube


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    blocks = (a[i : i + BLOCK] for i in range(0, len(a), BLOCK))
    return float(sum(_kernel(block @ b.T, a.shape[1]).sum() for block in blocks))


def _kernel_diagonal(a: np.ndarray) -> float:
    return float(_kernel(np.square(a).sum(axis=1), a.shape[1]).sum())


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise ValueError(f"features must be [images, d] on both sides with the same d, got {a.shape} and {b.shape}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"each side must have at least two images, got {len(a)} and {len(b)}")
    for features in (a, b):
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise ValueError(
                f"features must be finite, got nan or infinity for image {row}; check that image and the extractor"
            )
    return a, b

"""Distances of features are what their formulas say, for many images and for few."""

import numpy as np
import pytest
import torch
from scipy import linalg

from lmfusion.evaluation.metrics.feature_distances import frechet_distance, kernel_distance, kernel_distances_of_subsets


def features(count, width, seed, scale=1.0, shift=0.0):
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(width, width))
    return generator.normal(size=(count, width)) @ mixed * scale + shift


def frechet_by_sqrtm(a, b):
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    means = a.mean(axis=0) - b.mean(axis=0)
    return means @ means + np.trace(covariances[0] + covariances[1] - 2 * root)


@pytest.mark.parametrize(("n", "m", "width"), [(200, 150, 8), (65, 90, 64), (400, 300, 1)])
def test_frechet_distance_is_that_of_a_matrix_root(n, m, width):
    a, b = features(n, width, 0), features(m, width, 1, shift=0.3)
    if width == 1:
        expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    else:
        expected = frechet_by_sqrtm(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_with_fewer_images_than_features():
    """Padded with zeros to the same singular covariances, in a space where they are not."""
    a, b = features(12, 5, 0), features(9, 5, 1, shift=1.0)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(40, 40)))[0][:5]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_by_sqrtm(a, b), rel=1e-8)


def test_frechet_distance_of_covariances_that_commute_is_known():
    a = np.random.default_rng(0).normal(size=(50, 6))
    # 3 a + 1 has the same directions: every deviation is three times as wide
    expected = np.square(a.mean(axis=0) * 2 + 1).sum() + 4 * a.var(axis=0, ddof=1).sum()
    assert frechet_distance(a, 3 * a + 1) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_a_set_to_itself_is_zero_with_more_features_than_images():
    a = features(30, 100, 0).astype(np.float32)
    assert 0 <= frechet_distance(a, a) < 1e-9 * np.square(a).sum()
    assert frechet_distance(a + 1e4, a + 1e4) < 1e-6


def test_frechet_distance_is_symmetric_and_ignores_the_order_of_images():
    a, b = features(40, 7, 0), features(30, 7, 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b[::-1], a), rel=1e-10)


def test_frechet_distance_is_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Flatten(torch.nn.Module):
        """Features without weights: the pixels."""

        num_features = 12

        def forward(self, images):
            return images.flatten(1).double()

    metric = fid.FrechetInceptionDistance(feature=Flatten()).set_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, high, (60, 3, 2, 2), generator=generator, dtype=torch.uint8) for high in (256, 180)]
    for real, batch in zip((True, False), images, strict=True):
        metric.update(batch, real=real)
    ours = frechet_distance(*(batch.flatten(1).numpy() for batch in images))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-5)


def kernel_distance_by_pairs(a, b):
    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    within = [np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    return sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])


def test_kernel_distance_is_the_sum_over_pairs(monkeypatch):
    a, b = features(17, 5, 0), features(11, 5, 1, shift=0.4)
    expected = kernel_distance_by_pairs(a, b)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr("lmfusion.evaluation.metrics.feature_distances.BLOCK", 4)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased():
    generator = np.random.default_rng(5)
    same = [kernel_distance(*generator.normal(size=(2, 12, 3))) for _ in range(600)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0


def test_subsets_of_all_images_are_all_images():
    a, b = features(14, 6, 0), features(14, 6, 1)
    subsets = kernel_distances_of_subsets(a, b, num_subsets=3, subset_size=14)
    assert subsets == pytest.approx([kernel_distance(a, b)] * 3, rel=1e-9)


def test_subsets_depend_on_the_seed_and_average_to_the_whole():
    a, b = features(120, 4, 0), features(150, 4, 0, shift=1.0)
    subsets = kernel_distances_of_subsets(a, b, num_subsets=200, subset_size=40, seed=1)
    assert np.array_equal(subsets, kernel_distances_of_subsets(a, b, num_subsets=200, subset_size=40, seed=1))
    assert not np.array_equal(subsets, kernel_distances_of_subsets(a, b, num_subsets=200, subset_size=40, seed=2))
    assert subsets.mean() == pytest.approx(kernel_distance(a, b), abs=4 * subsets.std() / np.sqrt(200))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((3, 4)), np.ones((3, 5)), "with the same d"),
        (np.ones(3), np.ones(3), "with the same d"),
        (np.ones((3, 4)), np.ones((1, 4)), "at least two images, got 3 and 1"),
        (
            np.ones((3, 4)),
            np.array([[1.0, 2, 3, 4], [1, np.nan, 3, 4]]),
            "must be finite, got nan or infinity for image 1",
        ),
    ],
)
def test_bad_features_are_refused(distance, a, b, message):
    with pytest.raises(ValueError, match=message):
        distance(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset_size": 11}, "subset_size must be 2 to 10 .* got 11"),
        ({"subset_size": 1}, "subset_size must be 2 to 10 .* got 1"),
        ({"num_subsets": 0}, "num_subsets must be at least 1, got 0"),
    ],
)
def test_bad_subsets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distances_of_subsets(np.ones((10, 2)), np.ones((12, 2)), **{"subset_size": 5, **options})

"""Bootstrap intervals cover what they should, and are the same for the same seed."""

import numpy as np
import pytest

from lmfusion.evaluation.metrics.bootstrap import bootstrap


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = bootstrap(values)
    width = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - width, abs=0.1 * width)
    assert high == pytest.approx(values.mean() + width, abs=0.1 * width)


def test_the_interval_holds_the_true_mean_about_19_times_of_20():
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        low, high = bootstrap(generator.exponential(1.0, size=80), num_resamples=200, seed=seed)
        hits += low <= 1.0 <= high
    assert 175 <= hits <= 198


def test_the_seed_decides():
    values = np.random.default_rng(2).random(50)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_rows_are_sampled_whole():
    rows = np.arange(30)[:, None] * np.array([1, -1])
    assert bootstrap(rows, lambda resample: float(resample.sum())) == (0.0, 0.0)


def test_a_single_sample_has_no_width():
    assert bootstrap(np.array([4.0])) == (4.0, 4.0)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.array([]), {}, "at least one sample"),
        (np.array(3.0), {}, "at least one sample"),
        (np.ones(3), {"num_resamples": 0}, "num_resamples must be at least 1, .* got 0"),
        (np.array([1.0, np.nan]), {}, "must be finite"),
    ],
)
def test_bad_input_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(values, **options)

"""Intervals agree with other code and have their nominal coverage."""

import math

import numpy as np
import pytest
import scipy.stats

from ccu_jax.metrics.intervals import (
    Interval,
    clopper_pearson,
    difference_interval,
    effective_sample_size,
    jackknife_interval,
    mean_interval,
    mean_over_seeds,
    proportion_interval,
    quantile_interval,
)
from tests.metrics.samples import EXACT, compute_coverage, require


@pytest.mark.parametrize("hits, count", [(0, 1), (1, 1), (0, 20), (3, 20), (700, 700)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_clopper_pearson_agrees_with_scipy(hits, count, confidence):
    exact = scipy.stats.binomtest(hits, count).proportion_ci(confidence, "exact")
    interval = clopper_pearson(hits, count, confidence)
    assert interval == pytest.approx((hits / count, exact.low, exact.high), abs=EXACT)
    assert clopper_pearson(0, 0) is None


def test_mean_has_the_t_interval_widened_if_values_are_bounded():
    values = np.random.default_rng(0).random(40)
    exact = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    interval = require(mean_interval(values))
    assert interval == pytest.approx((values.mean(), *exact), abs=EXACT)
    wider = require(mean_interval(values, bounds=(0, 1)))
    assert interval.high < wider.high < interval.high + 0.01
    # Five equal values have an error.
    few = require(mean_interval(np.ones(5), bounds=(0, 1)))
    assert few.value == few.high == 1 and few.low < 0.7
    assert require(mean_interval(np.ones(5000), bounds=(0, 1))).low > 0.999
    assert mean_interval([0.5], bounds=(0, 1)) == (0.5, 0, 1)
    assert mean_interval([0.5]) is mean_interval([]) is None
    assert mean_interval([0.5, np.nan]) is None


def test_jackknife_of_a_mean_is_its_t_interval():
    values = np.random.default_rng(0).normal(size=40)
    interval = require(jackknife_interval(np.mean, values, folds=40))
    assert interval == pytest.approx(mean_interval(values), abs=EXACT)
    fewer = require(jackknife_interval(np.mean, values, folds=10))
    assert 0.5 < (fewer.high - fewer.low) / (interval.high - interval.low) < 2
    assert jackknife_interval(lambda x: None, values) is None
    assert jackknife_interval(np.mean, values[:1]) is None


def test_quantile_is_that_of_the_values_and_needs_enough_of_them():
    values = np.arange(73.0)
    assert require(quantile_interval(values, 0.9)).value == np.quantile(values, 0.9)
    assert quantile_interval(values, 0.95) and not quantile_interval(values[:60], 0.95)
    assert quantile_interval([], 0.5) is quantile_interval([np.nan], 0.5) is None


def test_mean_over_seeds_covers_rows_and_seeds():
    one = Interval(0.6, 0.5, 0.7)
    assert mean_over_seeds([one]) == pytest.approx(one)
    # Equal seeds narrow the interval, unless they share their rows.
    assert mean_over_seeds([one] * 4) == pytest.approx((0.6, 0.55, 0.65))
    assert mean_over_seeds([one] * 4, has_shared_rows=True) == pytest.approx(one)
    # Different seeds widen it, within the bounds.
    seeds = [Interval(x, x - 0.01, x + 0.01) for x in (0.5, 0.6, 0.7)]
    exact = scipy.stats.ttest_1samp([0.5, 0.6, 0.7], 0).confidence_interval()
    assert mean_over_seeds(seeds) == pytest.approx((0.6, *exact))
    two = [Interval(0.1, 0.0, 0.2), Interval(0.9, 0.8, 1.0)]
    assert require(mean_over_seeds(two, bounds=(0, 1)))[1:] == (0, 1)
    assert mean_over_seeds([one, None]) is mean_over_seeds([]) is None


def test_difference_of_two_intervals_adds_their_squares():
    difference = difference_interval(Interval(0.7, 0.6, 0.8), Interval(0.4, 0.3, 0.5))
    half_width = 0.1 * math.sqrt(2)
    assert difference == pytest.approx((0.3, 0.3 - half_width, 0.3 + half_width))


def test_effective_sample_size_is_the_number_of_equal_groups():
    assert effective_sample_size(np.arange(7)) == 7
    assert effective_sample_size([1, 1, 2, 2]) == 2
    assert effective_sample_size([1] * 9 + [2]) == pytest.approx(100 / 82)


def test_copies_of_rows_in_groups_do_not_narrow_an_interval():
    values, groups = np.random.default_rng(5).normal(size=60), np.arange(60)
    copies, of = np.repeat(values, 4), np.repeat(groups, 4)
    for interval in (
        lambda x, groups=None: mean_interval(x, bounds=(-9, 9), groups=groups),
        lambda x, groups=None: jackknife_interval(np.mean, x, groups=groups),
    ):
        assert interval(copies, of) == pytest.approx(interval(values), abs=EXACT)


def sample_quantile(rng):
    return quantile_interval(rng.normal(size=80), 0.9)


def sample_proportion(rng):
    groups = np.repeat(np.arange(60), rng.integers(1, 9, size=60))
    return proportion_interval((rng.random(60) < 0.3)[groups], groups=groups)


def sample_mean(rng):
    sizes = rng.integers(1, 8, size=50)
    names = np.repeat([f"group {n}" for n in range(50)], sizes)
    values = np.repeat(rng.normal(size=50), sizes)
    return mean_interval(values + 0.3 * rng.normal(size=len(names)), groups=names)


@pytest.mark.parametrize(
    "sample, truth, low, high",
    [
        (sample_quantile, scipy.stats.norm.ppf(0.9), 0.92, 0.995),
        (sample_proportion, 0.3, 0.93, 1),
        (sample_mean, 0, 0.91, 0.99),
    ],
    ids=["quantile", "proportion of unequal groups", "mean of unequal groups"],
)
def test_intervals_have_their_coverage(sample, truth, low, high):
    assert low <= compute_coverage(sample, truth) <= high

"""Confidence intervals of proportions, means, quantiles, scores and means over seeds.

They cover the sampling error of the rows, given the trained models. The variation
between training runs is covered by `mean_over_seeds` alone.

Rows of one group (images of one product, near-duplicates) are not independent. With
`groups` `[N]`, a group number or name per row, groups are the sampling units.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


class Interval(NamedTuple):
    """An estimate with its confidence limits."""

    value: float
    low: float
    high: float


Bounds = tuple[float, float]
Groups = np.ndarray | None
Values = np.ndarray | Sequence[float]
_UNBOUNDED: Bounds = (-math.inf, math.inf)


def to_list(interval: Interval | None) -> list[float] | None:
    """Converts an interval to `[value, low, high]`, and None to None."""
    return None if interval is None else [float(x) for x in interval]


def interval_from_variance(
    value: float,
    variance: float,
    degrees: int | None = None,
    confidence: float = 0.95,
    bounds: Bounds = _UNBOUNDED,
) -> Interval:
    """Returns the confidence interval of an estimate, clipped to the bounds.

    Student's t-interval with `degrees` of freedom (at least 1), if given, else normal.
    """
    level = (1 + confidence) / 2
    if degrees is None:
        quantile = scipy.stats.norm.ppf(level)
    else:
        quantile = scipy.stats.t.ppf(level, max(degrees, 1))
    half_width = float(quantile) * math.sqrt(variance)
    interval = Interval(float(value), value - half_width, value + half_width)
    return _clip(interval, bounds)


def clopper_pearson(
    successes: float, trials: float, confidence: float = 0.95
) -> Interval | None:
    """Returns a proportion with its exact interval (Clopper & Pearson 1934).

    None if there are no trials. Unlike in SciPy, counts may be fractional.
    """
    if trials < 1:
        return None
    tail = (1 - confidence) / 2
    beta = scipy.stats.beta.ppf
    failures = trials - successes
    low = beta(tail, successes, failures + 1) if successes else 0.0
    high = beta(1 - tail, successes + 1, failures) if failures > 0 else 1.0
    return Interval(float(successes / trials), float(low), float(high))


def proportion_interval(
    successes: Values, confidence: float = 0.95, groups: Groups = None
) -> Interval | None:
    """Returns the fraction of True in `[N]` with its `clopper_pearson` interval.

    With `groups`, the number of trials is the `effective_sample_size`, which is
    conservative unless all rows of a group have the same outcome.
    """
    successes = np.asarray(successes, bool)
    if groups is None or not len(successes):
        return clopper_pearson(successes.sum(), len(successes), confidence)
    trials = effective_sample_size(groups)
    return clopper_pearson(trials * successes.mean(), trials, confidence)


def effective_sample_size(groups: Values) -> float:
    """Returns (sum n)^2 / sum n^2 over the sizes n of the groups (Kish 1965)."""
    size = np.bincount(group_indices(groups))
    return float(size.sum() ** 2 / (size**2).sum())


def variance_of_mean(values: Values, span: float = 0.0, groups: Groups = None) -> float:
    """Returns the sampling variance of the mean of `[N]` values.

    Two pseudo-values are added, half a `span` above and below the mean, because a few
    equal values do not prove zero variance (compare Agresti & Coull 1998). `span` is
    the largest possible difference of two values; 0 adds none. With `groups`, the
    variance is cluster-robust (Liang & Zeger 1986).
    """
    values = np.asarray(values, np.float64)
    deviation = values - values.mean()
    if groups is not None:
        deviation = np.bincount(group_indices(groups), deviation)
        deviation = deviation * (len(deviation) / len(values))
    degrees = max(len(deviation) - 1, 1)
    squares = deviation @ deviation + span**2 / 2
    return float(squares / (degrees * len(deviation)))


def group_indices(groups: Values) -> np.ndarray:
    """Returns the index of each row's group, `[N]`, numbered from 0."""
    return np.unique(groups, return_inverse=True)[1].reshape(-1)


def bootstrap_counts(
    rng: np.random.Generator, resamples: int, num_rows: int, groups: Groups = None
) -> np.ndarray:
    """Returns how often each row is in each bootstrap sample, `[resamples, num_rows]`.

    With `groups`, whole groups are resampled.
    """
    unit, num_units = _sampling_units(num_rows, groups)
    sample = rng.integers(num_units, size=(resamples, num_units))
    sample += np.arange(resamples)[:, None] * num_units
    counts = np.bincount(sample.ravel(), minlength=resamples * num_units)
    return counts.reshape(resamples, num_units)[:, unit]


def mean_interval(
    values: Values,
    *,
    bounds: Bounds | None = None,
    confidence: float = 0.95,
    groups: Groups = None,
) -> Interval | None:
    """Returns the mean of `[N]` independent values with its t-interval.

    With `bounds`, the range of the values, the interval is clipped to them and widened
    by the pseudo-values of `variance_of_mean`. None if there is no value, only one and
    no bounds, or a value is not finite.
    """
    values = np.asarray(values, np.float64)
    num_units = len(values) if groups is None else len(np.unique(groups))
    if num_units < (1 if bounds else 2) or not np.isfinite(values).all():
        return None
    mean, span = float(values.mean()), bounds[1] - bounds[0] if bounds else 0.0
    variance = variance_of_mean(values, span, groups)
    limits = bounds or _UNBOUNDED
    return interval_from_variance(mean, variance, num_units - 1, confidence, limits)


def quantile_interval(
    values: Values, quantile: float, *, groups: Groups = None
) -> Interval | None:
    """Returns a quantile of `[N]` independent values with its 95 % interval.

    The limits are order statistics (Conover 1999). With `groups`, their ranks are those
    for `effective_sample_size` values. None if there are too few values (72 are needed
    for the .95 quantile) or one is not finite.
    """
    values = np.sort(np.asarray(values, np.float64))
    if not len(values) or not np.isfinite(values).all():
        return None
    count = len(values) if groups is None else int(effective_sample_size(groups))
    tails = [(1 - 0.95) / 2, (1 + 0.95) / 2]
    low, high = scipy.stats.binom.ppf(tails, count, quantile).astype(int)
    if low < 1 or high >= count:
        return None
    # From ranks among the effective values to ranks among all values.
    low, high = low * len(values) // count, -(-high * len(values) // count)
    value = np.quantile(values, quantile)
    return Interval(float(value), float(values[low - 1]), float(values[high]))


def jackknife_interval(
    score: Callable[..., float | None],
    *arrays: np.ndarray,
    folds: int = 20,
    groups: Groups = None,
    bounds: Bounds = _UNBOUNDED,
) -> Interval | None:
    """Returns `score(*arrays)` and its 95 % delete-a-group jackknife interval.

    For scores without a variance formula (Shao & Wu 1989). `score` is a function of the
    arrays `[N, ...]`. The rows are divided into random folds, which are left out in
    turn. None if the score of all rows, or of all but one fold, is None or not finite.
    """
    fold = assign_folds(len(arrays[0]), folds, groups)
    folds = int(fold.max(initial=0)) + 1
    value = score(*arrays) if folds > 1 else None
    if value is None:
        return None
    replicates = [score(*(x[fold != k] for x in arrays)) for k in range(folds)]
    interval = interval_from_replicates(value, replicates)
    return None if interval is None else _clip(interval, bounds)


def assign_folds(num_rows: int, folds: int, groups: Groups = None) -> np.ndarray:
    """Assigns each row to a random fold, `[num_rows]`, without splitting groups."""
    unit, num_units = _sampling_units(num_rows, groups)
    return (np.random.default_rng(0).permutation(num_units) % folds)[unit]


def interval_from_replicates(
    value: float | None, replicates: Sequence[float | None]
) -> Interval | None:
    """Returns the 95 % jackknife interval from the leave-one-fold-out replicates."""
    finite = [x for x in replicates if x is not None and math.isfinite(x)]
    if value is None or len(finite) < len(replicates):
        return None
    # Jackknife variance: (n - 1) / n * sum((x - mean)^2) = (n - 1)^2 * var(mean).
    variance = variance_of_mean(finite) * (len(finite) - 1) ** 2
    return interval_from_variance(value, variance, len(finite) - 1)


def mean_over_seeds(
    intervals: Sequence[Interval | None],
    *,
    confidence: float = 0.95,
    has_shared_rows: bool = False,
    bounds: Bounds = _UNBOUNDED,
) -> Interval | None:
    """Returns the mean of an estimate over seeds, given the interval of each seed.

    The interval covers both the sampling error of the rows and, from two seeds on, the
    t-interval of the seeds' values. With `has_shared_rows`, the sampling errors do not
    average out over seeds. None if there is no seed or the interval of one is None.
    """
    estimates = [x for x in intervals if x is not None]
    if not estimates or len(estimates) < len(intervals):
        return None
    value, low, high = np.array(estimates, np.float64).T
    count, mean = len(estimates), value.mean()
    if has_shared_rows:
        down, up = (value - low).sum(), (high - value).sum()
    else:
        down, up = np.sqrt([((value - low) ** 2).sum(), ((high - value) ** 2).sum()])
    rows = Interval(float(mean), float(mean - down / count), float(mean + up / count))
    seeds = mean_interval(value, confidence=confidence)
    return _clip(rows if seeds is None else hull(rows, seeds), bounds)


def difference_interval(first: Interval, second: Interval) -> Interval:
    """Returns the interval of `first - second`, if independent (Zou & Donner 2008)."""
    value = first.value - second.value
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - down, value + up)


def hull(first: Interval, second: Interval) -> Interval:
    """Returns the first estimate with the smallest interval that contains both."""
    low, high = min(first.low, second.low), max(first.high, second.high)
    return Interval(first.value, low, high)


def _clip(interval: Interval, bounds: Bounds) -> Interval:
    low, high = max(interval.low, bounds[0]), min(interval.high, bounds[1])
    return Interval(interval.value, float(low), float(high))


def _sampling_units(num_rows: int, groups: Groups) -> tuple[np.ndarray, int]:
    """Returns the sampling unit of each row, `[num_rows]`, and their number."""
    unit = np.arange(num_rows) if groups is None else group_indices(groups)
    return unit, int(unit.max(initial=-1)) + 1

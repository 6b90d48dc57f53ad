"""Confidence intervals of proportions, means, quantiles, scores and means over seeds.

They cover the sampling error of the rows, given the trained models. The variation
between training runs is covered by `mean_over_seeds` alone.

Rows of one group (images of one product, near-duplicates) are not independent. With
`groups` `[N]`, numbers or names, groups are the sampling units instead of rows.
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
    """Returns an interval as plain JSON."""
    return None if interval is None else [float(x) for x in interval]


def symmetric_interval(
    value: float, half_width: float, bounds: Bounds = _UNBOUNDED
) -> Interval:
    """Returns value +- half_width, clipped to the bounds."""
    low, high = max(value - half_width, bounds[0]), min(value + half_width, bounds[1])
    return Interval(float(value), float(low), float(high))


def student_t(confidence: float, degrees: int) -> float:
    """Returns the two-sided critical value of Student's t; 1 degree at least."""
    return float(scipy.stats.t.ppf((1 + confidence) / 2, max(degrees, 1)))


def clip_interval(interval: Interval, bounds: Bounds) -> Interval:
    """Clips the confidence limits to the bounds of the quantity."""
    low, high = max(interval.low, bounds[0]), min(interval.high, bounds[1])
    return Interval(interval.value, low, high)


def clopper_pearson(
    successes: float, trials: float, confidence: float = 0.95
) -> Interval | None:
    """Returns a proportion with its exact interval (Clopper & Pearson 1934).

    None if there are no trials.
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
    """Returns the proportion of True among `[N]` with its `clopper_pearson` interval.

    With `groups` the number of trials is the `effective_sample_size`, which is
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

    As if there were two more values, half a span above and below the mean: a handful of
    equal values is no certainty (compare Agresti & Coull 1998). With `groups` the
    cluster-robust variance (Liang & Zeger 1986).

    Args:
        values: `[N]`.
        span: the largest possible difference of two values; 0 adds no values.
        groups: `[N]` or None.
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
    """Returns the group of each row as an integer from 0, `[N]`."""
    return np.unique(groups, return_inverse=True)[1].reshape(-1)


def bootstrap_counts(
    rng: np.random.Generator, resamples: int, num_rows: int, groups: Groups = None
) -> np.ndarray:
    """Returns how often each row is in each bootstrap sample, `[resamples, num_rows]`.

    With `groups` whole groups are drawn.
    """
    unit = np.arange(num_rows) if groups is None else group_indices(groups)
    num_units = int(unit.max(initial=-1)) + 1
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

    Args:
        values: `[N]`.
        bounds: of the values, if they have any; the interval is within them and is
            widened by the two extra values of `variance_of_mean`.
        confidence: of the interval.
        groups: `[N]` or None.

    Returns:
        None if there is no value, or one without bounds, or one that is not finite.
    """
    values = np.asarray(values, np.float64)
    num_units = len(values) if groups is None else len(np.unique(groups))
    if num_units < (1 if bounds else 2) or not np.isfinite(values).all():
        return None
    span = bounds[1] - bounds[0] if bounds else 0.0
    t = student_t(confidence, num_units - 1)
    half_width = t * math.sqrt(variance_of_mean(values, span, groups))
    return symmetric_interval(values.mean(), half_width, bounds or _UNBOUNDED)


def quantile_interval(
    values: Values, quantile: float, *, groups: Groups = None
) -> Interval | None:
    """Returns a quantile of `[N]` independent values with its interval of 95 %.

    The limits are two of the values (Conover 1999). With `groups` they are chosen as
    for `effective_sample_size` values.

    Returns:
        None if there are too few values (72 are needed for the .95 quantile) or one is
        not finite.
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
    """Returns a smooth score with its delete-a-group jackknife interval, of 95 %.

    For scores without a variance formula (Shao & Wu 1989). Evaluates the score
    `folds + 1` times.

    Args:
        score: a function of the arrays, or of the same subset of their rows.
        *arrays: each `[N, ...]`.
        folds: number of random parts of the rows that are left out in turn.
        groups: `[N]` or None.
        bounds: of the score.

    Returns:
        None if the score is None or not finite for all rows or without some part.
    """
    fold = assign_folds(len(arrays[0]), folds, groups)
    folds = int(fold.max(initial=0)) + 1
    value = score(*arrays) if folds > 1 else None
    if value is None:
        return None
    replicates = [score(*(x[fold != k] for x in arrays)) for k in range(folds)]
    interval = interval_from_replicates(value, replicates)
    return None if interval is None else clip_interval(interval, bounds)


def assign_folds(num_rows: int, folds: int, groups: Groups = None) -> np.ndarray:
    """Returns a random fold for each row, `[num_rows]`; a group is in one fold."""
    unit = np.arange(num_rows) if groups is None else group_indices(groups)
    num_units = int(unit.max(initial=-1)) + 1
    return (np.random.default_rng(0).permutation(num_units) % folds)[unit]


def interval_from_replicates(
    value: float | None, replicates: Sequence[float | None]
) -> Interval | None:
    """Returns a jackknife interval of 95 % from the values without each fold."""
    finite = [x for x in replicates if x is not None and math.isfinite(x)]
    if value is None or len(finite) < len(replicates):
        return None
    # Jackknife variance: (n - 1) / n * sum((x - mean)^2) = (n - 1)^2 * var(mean).
    variance = variance_of_mean(finite) * (len(finite) - 1) ** 2
    t = student_t(0.95, len(finite) - 1)
    return symmetric_interval(value, t * math.sqrt(variance))


def mean_over_seeds(
    intervals: Sequence[Interval | None],
    *,
    confidence: float = 0.95,
    shared: bool = False,
    bounds: Bounds = _UNBOUNDED,
) -> Interval | None:
    """Returns the mean of a value over seeds.

    The interval covers both the sampling error of the rows and, from two seeds on, the
    t-interval of the seeds' values.

    Args:
        intervals: of each seed.
        confidence: of the intervals.
        shared: whether seeds share rows, so that their errors do not average out.
        bounds: of the value.

    Returns:
        None if there is no seed or the interval of one is None.
    """
    measured = [x for x in intervals if x is not None]
    if not measured or len(measured) < len(intervals):
        return None
    value, low, high = np.array(measured, np.float64).T
    count, mean = len(measured), value.mean()
    if shared:
        down, up = (value - low).sum(), (high - value).sum()
    else:
        down, up = np.sqrt([((value - low) ** 2).sum(), ((high - value) ** 2).sum()])
    rows = Interval(float(mean), float(mean - down / count), float(mean + up / count))
    seeds = mean_interval(value, confidence=confidence)
    return clip_interval(rows if seeds is None else hull(rows, seeds), bounds)


def difference_interval(first: Interval, second: Interval) -> Interval:
    """Returns the difference of two independent estimates (Zou & Donner 2008)."""
    value = first.value - second.value
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - down, value + up)


def hull(first: Interval, second: Interval) -> Interval:
    """Returns the first value with the smallest interval that contains both."""
    low, high = min(first.low, second.low), max(first.high, second.high)
    return Interval(first.value, low, high)

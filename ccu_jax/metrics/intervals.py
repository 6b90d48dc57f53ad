"""Intervals: of shares, of means over rows, of any score, over seeds.

They tell how far a value may be off because these rows, and not others like them, were
drawn. How much another seed of the training changes is told by `mean_over_seeds` alone.

Rows that go together (pictures of one product, near-duplicates) do not tell as much as
as many rows that do not. Whoever gives their `groups` `[N]`, names or numbers, gets an
interval as if groups had been drawn, and not rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


class Interval(NamedTuple):
    """A value, and the ends of the interval in which the truth lies."""

    value: float
    low: float
    high: float


def to_list(interval: Interval | None) -> list[float] | None:
    """An interval as plain JSON."""
    return None if interval is None else [float(x) for x in interval]


def symmetric_interval(
    value: float, half: float, lowest=-math.inf, highest=math.inf
) -> Interval:
    """An interval of half-width `half`, cut where no value can be."""
    low, high = max(value - half, lowest), min(value + half, highest)
    return Interval(float(value), float(low), float(high))


def clopper_pearson(
    hits: float, count: int, confidence: float = 0.95
) -> Interval | None:
    """A share of independent trials with its exact interval (Clopper & Pearson 1934).

    None of no trials.
    """
    if count < 1:
        return None
    tail = (1 - confidence) / 2
    beta = scipy.stats.beta.ppf
    low = beta(tail, hits, count - hits + 1) if hits else 0.0
    high = beta(1 - tail, hits + 1, count - hits) if hits < count else 1.0
    return Interval(float(hits / count), float(low), float(high))


def proportion_interval(
    found, confidence: float = 0.95, groups=None
) -> Interval | None:
    """The share of rows `[N]` that were found, with `clopper_pearson`'s interval.

    Of rows in groups it is that of as many trials as they are worth if all rows of a
    group are found or none (`worth`), and wider than need be if not.
    """
    found = np.asarray(found, bool)
    if groups is None or not len(found):
        return clopper_pearson(found.sum(), len(found), confidence)
    count = effective_sample_size(groups)
    return clopper_pearson(count * found.mean(), count, confidence)


def effective_sample_size(groups) -> float:
    """As how many rows those in groups `[N]` count, where a group says one thing.

    (sum n)^2 / sum n^2 (Kish 1965): the number of groups where all are of one size, and
    fewer where some weigh more.
    """
    size = np.bincount(group_indices(groups))
    return float(size.sum() ** 2 / (size**2).sum())


def variance_of_mean(values, span: float = 0.0, groups=None) -> float:
    """The sampling variance of the mean of `[N]` values that are `span` apart at most.

    As if there were two more values, half a span above and below the mean. Without
    them, a handful of equal values would be taken for certain knowledge (as in the
    interval of Agresti & Coull 1998); of a thousand values it changes next to nothing.
    With `groups` it is that of sums over groups (Liang & Zeger 1986).
    """
    values = np.asarray(values, np.float64)
    apart = values - values.mean()
    if groups is not None:
        count = len(values)
        apart = np.bincount(group_indices(groups), apart)
        apart = apart * (len(apart) / count)
    free = max(len(apart) - 1, 1)
    return float((apart @ apart + span**2 / 2) / (free * len(apart)))


def group_indices(groups) -> np.ndarray:
    """Groups `[N]` as numbers from 0 on."""
    return np.unique(groups, return_inverse=True)[1].reshape(-1)


def bootstrap_counts(rng, times: int, count: int, groups=None) -> np.ndarray:
    """How often each of `count` rows comes in as many draws, `[times, count]`.

    With `groups` `[count]` as many groups are drawn as there are, whole.
    """
    place = np.arange(count) if groups is None else group_indices(groups)
    things = int(place.max(initial=-1)) + 1
    drawn = rng.integers(things, size=(times, things))
    drawn += np.arange(times)[:, None] * things
    often = np.bincount(drawn.ravel(), minlength=times * things)
    return often.reshape(times, things)[:, place]


def mean_interval(
    values,
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    groups=None,
) -> Interval | None:
    """The mean of independent values `[N]` with its t-interval.

    Args:
        values: one for each row, class or model.
        bounds: between which values are, where they are bounded; the interval is wider
            by the margin of `variance_of_mean` then, and within them.
        confidence: of the interval.
        groups: of the rows, where they go together.

    Returns:
        None of no values, of one without bounds, and where one is no number.
    """
    values = np.asarray(values, np.float64)
    count = len(values) if groups is None else len(np.unique(groups))
    if count < (1 if bounds else 2) or not np.isfinite(values).all():
        return None
    lowest, highest = bounds or (-math.inf, math.inf)
    span = highest - lowest if bounds else 0.0
    t = scipy.stats.t.ppf((1 + confidence) / 2, max(count - 1, 1))
    half = t * math.sqrt(variance_of_mean(values, span, groups))
    return symmetric_interval(values.mean(), half, lowest, highest)


def quantile_interval(
    values, quantile: float, *, confidence: float = 0.95, groups=None
) -> Interval | None:
    """A quantile of independent values `[N]`, with an interval of two of the values.

    Those whose ranks the true quantile lies between (Conover 1999). None of too few
    values (of the .95 quantile, 72 are needed), and where one is no number. With
    `groups` it is that of as many values as they are `worth`.
    """
    values = np.sort(np.asarray(values, np.float64))
    if not len(values) or not np.isfinite(values).all():
        return None
    count = len(values) if groups is None else int(effective_sample_size(groups))
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = scipy.stats.binom.ppf(tails, count, quantile).astype(int)
    if low < 1 or high >= count:
        return None
    # The same shares of all values.
    low, high = low * len(values) // count, -(-high * len(values) // count)
    value = np.quantile(values, quantile)
    return Interval(float(value), float(values[low - 1]), float(values[high]))


def jackknife_interval(
    score: Callable[..., float | None],
    *arrays,
    parts: int = 20,
    confidence: float = 0.95,
    seed: int = 0,
    groups=None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval | None:
    """Any smooth score of rows with the interval of a delete-a-part jackknife.

    For what has no formula of its own, such as the mean average precision or the CKA.
    It takes `parts` times as long as the score. (Shao & Wu 1989.)

    Args:
        score: of the arrays, or of some of their rows.
        *arrays: each `[N, ...]`.
        parts: how many are left out in turn.
        confidence: of the interval.
        seed: of which rows are in which part.
        groups: of the rows, where they go together.
        bounds: where no value can be beyond.
    """
    part = assign_folds(len(arrays[0]), parts, seed, groups)
    parts = int(part.max(initial=0)) + 1
    value = score(*arrays) if parts > 1 else None
    if value is None:
        return None
    without = [score(*(x[part != left] for x in arrays)) for left in range(parts)]
    found = interval_from_replicates(value, without, confidence)
    return None if found is None else clip_interval(found, bounds)


def clip_interval(interval: Interval, bounds: tuple[float, float]) -> Interval:
    """The interval without what lies beyond the bounds, where no value can be."""
    value, low, high = interval
    return Interval(value, max(low, bounds[0]), min(high, bounds[1]))


def assign_folds(count: int, parts: int, seed: int, groups=None) -> np.ndarray:
    """The part of each of `count` rows, by chance, all of one size or nearly.

    Groups stay whole: then it is their number that is nearly the same in all parts.
    """
    place = np.arange(count) if groups is None else group_indices(groups)
    things = int(place.max(initial=-1)) + 1
    return (np.random.default_rng(seed).permutation(things) % parts)[place]


def interval_from_replicates(value, without, confidence: float) -> Interval | None:
    """The jackknife's interval of a value, from those `without` each part."""
    if any(part is None or not math.isfinite(part) for part in without):
        return None
    # The variance of the mean of n values is this jackknife's over (n - 1)^2.
    variance = variance_of_mean(without) * (len(without) - 1) ** 2
    t = scipy.stats.t.ppf((1 + confidence) / 2, len(without) - 1)
    return symmetric_interval(value, t * math.sqrt(variance))


def mean_over_seeds(
    intervals: Sequence[Interval | None],
    *,
    confidence: float = 0.95,
    shared: bool = False,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval | None:
    """The mean of one value over seeds, from its intervals of each.

    The wider of two intervals: that of the rows, and the t-interval of the values. One
    seed has only the first. Of two the second is so wide that it tells nothing.

    Args:
        intervals: of each seed.
        confidence: of the interval.
        shared: whether seeds have rows in common: their errors do not even out then.
        bounds: where no value can be beyond.

    Returns:
        None where a seed's is.
    """
    known = [x for x in intervals if x is not None]
    if not known or len(known) < len(intervals):
        return None
    value, low, high = np.array(known, np.float64).T
    count, mean = len(known), value.mean()
    if shared:
        down, up = (value - low).sum(), (high - value).sum()
    else:
        down, up = np.sqrt([((value - low) ** 2).sum(), ((high - value) ** 2).sum()])
    told = Interval(float(mean), float(mean - down / count), float(mean + up / count))
    spread = mean_interval(value, confidence=confidence)
    return clip_interval(told if spread is None else hull(told, spread), bounds)


def difference_interval(first: Interval, second: Interval) -> Interval:
    """The difference of two independent values, from their intervals.

    (Zou & Donner 2008.) The confidence is theirs.
    """
    value = first.value - second.value
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - down, value + up)


def hull(first: Interval, second: Interval) -> Interval:
    """The first's value, with the smallest interval that holds both."""
    return Interval(
        first.value, min(first.low, second.low), max(first.high, second.high)
    )

"""How far pools of unlearned models are from pools of retrained ones, row by row.

Both scores depend on the number of models and are not at their best value even for two
pools of retrained models. So each needs such a pair as its control, of as many models,
and only the distance to the control's value means anything.
"""

import math
from typing import NamedTuple

import numpy as np

from ccu_jax.metrics.intervals import Interval, mean_interval, quantile_interval

_MOST = 50.0
# Values at once, 32 MB a table.
_AT_ONCE = 1 << 22


class PoolScores(NamedTuple):
    """A score of unlearned against retrained models, and of its control.

    The control is the same score of other retrained models. `models`: on each side.
    """

    score: Interval | None
    control: Interval | None
    models: int


def epsilon_by_row(unlearned, retrained, delta: float = 1e-5) -> np.ndarray:
    """How well one threshold tells unlearned from retrained models, by row, 0 to 50.

    The rule of the NeurIPS 2023 unlearning competition (Triantafillou et al. 2024), for
    single thresholds, all of them: the models of the higher median are to be above it.
    epsilon is max(ln((1 - delta - FPR) / FNR), ln((1 - delta - FNR) / FPR)) at the best
    threshold; those with exactly one of both rates zero do not count, with both zero
    it is 50, as it is where one side's range is less than 1 % of the other's. A row
    with no threshold that counts has 0.

    Args:
        unlearned: `[M, N]` signals (`attacks.margin`) of M unlearned models.
        retrained: `[M, N]` of as many retrained ones.
        delta: of (epsilon, delta).
    """
    unlearned, retrained = _as_many(unlearned, retrained)
    step = max(_AT_ONCE // (2 * len(unlearned)), 1)
    starts = range(0, unlearned.shape[1], step)
    parts = [
        _epsilons(unlearned[:, i : i + step], retrained[:, i : i + step], delta)
        for i in starts
    ]
    return np.concatenate([np.zeros(0), *parts])


def forgetting_points_by_row(epsilons, models: int) -> np.ndarray:
    """H(epsilon) of the competition: 2^-floor(2 epsilon), by row.

    And 0 from ceil(ln(models - 1)) on, more than which so many models cannot show.
    """
    epsilons = np.asarray(epsilons, np.float64)
    most = math.ceil(math.log(models - 1))
    return np.where(epsilons < most, 0.5 ** np.floor(2 * epsilons), 0.0)


def forgetting_score(
    unlearned, retrained, control, delta: float = 1e-5, *, groups=None
) -> PoolScores:
    """Forgetting quality F of the NeurIPS 2023 competition, the mean of H over rows.

    Args:
        unlearned: `[M, N]` signals of M unlearned models on the unlearn set.
        retrained: `[M, N]` of as many retrained ones.
        control: `[M, N]` of as many other retrained ones.
        delta: of (epsilon, delta).
        groups: `[N]`, of rows that go together.

    Raises:
        ValueError: where the pools are not of one size, or of fewer than 3 models.
    """
    models = len(unlearned)
    if models < 3:
        raise ValueError(f"{models} models a side cannot show anything: 3 are needed")

    def one(pool):
        if not _numbers(pool, retrained):
            return None
        points = forgetting_points_by_row(
            epsilon_by_row(pool, retrained, delta), models
        )
        return mean_interval(points, bounds=(0, 1), groups=groups)

    return PoolScores(one(unlearned), one(control), models)


def final_score(
    forgetting: float,
    retain: tuple[float, float],
    test: tuple[float, float],
) -> float | None:
    """The competition's F * (RA_U / RA_R) * (TA_U / TA_R).

    Args:
        forgetting: F, as `forgetting_score` gives it.
        retain: mean accuracy on the retain set of unlearned and retrained models.
        test: likewise on the test set.
    """
    if not retain[1] or not test[1] or not _numbers(forgetting, retain, test):
        return None
    return forgetting * retain[0] / retain[1] * test[0] / test[1]


def klom_by_row(unlearned, retrained, *, bins: int = 20, least: float = 1e-5):
    """KL of unlearned models' margins from those of retrained ones, `[N]`, in nats.

    KLOM (Georgiev et al. 2025): margins clipped to +-100, histograms of `bins` bins
    over the range of both, no bin of the retrained emptier than `least`. The highest
    margin is in the last bin; public code leaves it out of all.

    Args:
        unlearned: `[M, N]` signals (`attacks.margin`) of M unlearned models.
        retrained: `[M, N]` of as many retrained ones.
        bins: of the histograms.
        least: share of a bin, at least.
    """
    p, q = (np.clip(x, -100, 100) for x in _as_many(unlearned, retrained))
    low, high = np.minimum(p.min(0), q.min(0)), np.maximum(p.max(0), q.max(0))
    width = np.where(high > low, high - low, 1.0)
    rows = np.arange(p.shape[1])

    def share(x):
        place = np.minimum(((x - low) / width * bins).astype(int), bins - 1)
        count = np.bincount((place + bins * rows).ravel(), minlength=bins * len(rows))
        return count.reshape(len(rows), bins) / len(x)

    p, q = share(p), share(q)
    return (p * np.log(np.where(p > 0, p, 1) / np.maximum(q, least))).sum(axis=1)


def klom(
    unlearned, retrained, control, *, quantile: float | None = None, groups=None
) -> PoolScores:
    """The mean over rows of `klom_by_row`, or a quantile of it (such as .95).

    On each set by itself: unlearn, retain, test. Args as `forgetting_score`.
    """

    def one(pool):
        if not _numbers(pool, retrained):
            return None
        found = klom_by_row(pool, retrained)
        if quantile is None:
            return mean_interval(found, groups=groups)
        return quantile_interval(found, quantile, groups=groups)

    return PoolScores(one(unlearned), one(control), len(retrained))


def _numbers(*values) -> bool:
    return all(np.isfinite(x).all() for x in values)


def _as_many(unlearned, retrained):
    unlearned, retrained = (np.asarray(x, np.float64) for x in (unlearned, retrained))
    if unlearned.shape != retrained.shape:
        raise ValueError(
            "as many models of both kinds are needed, of the same rows, not "
            f"{unlearned.shape} and {retrained.shape}"
        )
    return unlearned, retrained


def _epsilons(unlearned, retrained, delta):
    models = len(unlearned)
    higher = np.median(retrained, axis=0) > np.median(unlearned, axis=0)
    positive = np.where(higher, retrained, unlearned)
    negative = np.where(higher, unlearned, retrained)
    values = np.concatenate([positive, negative])
    order = np.argsort(values, axis=0, kind="stable")
    values = np.take_along_axis(values, order, axis=0)
    # Thresholds lie between two different neighbours.
    missed = np.cumsum(order < models, axis=0)[:-1]
    fnr = missed / models
    fpr = (models - (np.arange(1, 2 * models)[:, None] - missed)) / models
    apart = values[1:] > values[:-1]
    counts = apart & (fnr > 0) & (fpr > 0)
    fnr_, fpr_ = np.where(counts, fnr, 1), np.where(counts, fpr, 1)
    ratios = [
        np.maximum(1 - delta - a, 1e-300) / b for a, b in ((fpr_, fnr_), (fnr_, fpr_))
    ]
    found = np.where(counts, np.log(np.maximum(*ratios)), 0).max(axis=0)
    separate = (apart & (fnr == 0) & (fpr == 0)).any(axis=0)
    ranges = np.sort([np.ptp(positive, axis=0), np.ptp(negative, axis=0)], axis=0)
    peaky = ranges[0] < 0.01 * ranges[1]
    return np.where(separate | peaky, _MOST, np.clip(found, 0, _MOST))

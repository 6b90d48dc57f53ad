"""Per-row distances between the output distributions of unlearned and retrained models.

Both scores depend on the number of models and do not reach their best value even for
two sets of retrained models. So each is returned with a control, the score of a second
set of retrained models; only the difference from the control is meaningful.

Signals (`membership.margin`) are `[M, N]`: of M models on N rows. All sets of models
have the same size.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ccu_jax.metrics.intervals import Groups, Interval, mean_interval, quantile_interval

_MAX_EPSILON = 50.0
_DELTA = 1e-5
_MAX_VALUES = 1 << 22  # values of a chunk of rows: 32 MB
# KLOM's histograms: the number of bins, and the minimum probability of a retrained bin.
_NUM_BINS, _MIN_PROBABILITY = 20, 1e-5


class PoolScores(NamedTuple):
    """A score that compares unlearned with retrained models, and its control."""

    score: Interval | None
    control: Interval | None  # score of a second set of retrained models
    models: int  # number of models in each set


def epsilon_by_row(unlearned: np.ndarray, retrained: np.ndarray) -> np.ndarray:
    """Returns the largest epsilon of any threshold attack on each row, `[N]`.

    Follows the rule of the NeurIPS 2023 unlearning competition (Triantafillou et al.
    2024) with all single thresholds as attacks: max(ln((1 - delta - FPR) / FNR), ln((1
    - delta - FNR) / FPR)), where positives are the models with the higher median.
    Thresholds with exactly one rate of 0 do not count. It is 50 if both rates are 0, or
    if the range of one side is below 1 % of the other's.
    """
    unlearned, retrained = _validate_signals(unlearned, retrained)
    step = max(_MAX_VALUES // (2 * len(unlearned)), 1)
    chunks = [
        _epsilon_of_chunk(unlearned[:, i : i + step], retrained[:, i : i + step])
        for i in range(0, unlearned.shape[1], step)
    ]
    return np.concatenate([np.zeros(0), *chunks])


def forgetting_points_by_row(epsilons: np.ndarray, models: int) -> np.ndarray:
    """Returns the competition's H(epsilon) = 2^-floor(2 epsilon), `[N]`.

    0 where epsilon >= ceil(ln(models - 1)), the limit of what `models` models can show.
    """
    limit = math.ceil(math.log(models - 1))
    return np.where(epsilons < limit, 0.5 ** np.floor(2 * epsilons), 0.0)


def forgetting_score(
    unlearned: np.ndarray,
    retrained: np.ndarray,
    control: np.ndarray,
    *,
    groups: Groups = None,
) -> PoolScores:
    """Returns the competition's forgetting quality F, the mean of H over rows.

    `control` are the signals of a second set of retrained models, `groups` `[N]` the
    groups of the rows (see `intervals`).

    Raises:
        ValueError: the shapes differ or there are fewer than 3 models in a set.
    """
    models = len(unlearned)
    if models < 3:
        raise ValueError(f"each pool must have at least 3 models, got {models}")

    def score(pool):
        points = forgetting_points_by_row(epsilon_by_row(pool, retrained), models)
        return mean_interval(points, bounds=(0, 1), groups=groups)

    return _score_pools(score, unlearned, retrained, control)


def final_score(
    forgetting: float, retain: tuple[float, float], test: tuple[float, float]
) -> float | None:
    """Returns the NeurIPS 2023 competition's score F * (RA_U / RA_R) * (TA_U / TA_R).

    F is that of `forgetting_score`. `retain` and `test` are the mean accuracies of
    unlearned and of retrained models on these splits. None if a score of the retrained
    models is 0 or one is not finite.
    """
    if not retain[1] or not test[1] or not _are_finite(forgetting, retain, test):
        return None
    return forgetting * retain[0] / retain[1] * test[0] / test[1]


def klom_by_row(unlearned: np.ndarray, retrained: np.ndarray) -> np.ndarray:
    """Returns KLOM, a KL divergence of margins in nats (Georgiev et al. 2025), `[N]`.

    The KL divergence of the margins of unlearned models from those of retrained ones,
    clipped to +-100, in histograms over their joint range. Unlike in the public code,
    the highest margin is in the last bin.
    """
    p, q = (np.clip(x, -100, 100) for x in _validate_signals(unlearned, retrained))
    low, high = np.minimum(p.min(0), q.min(0)), np.maximum(p.max(0), q.max(0))
    width = np.where(high > low, high - low, 1.0)
    rows = np.arange(p.shape[1])

    def histogram(x):
        index = ((x - low) / width * _NUM_BINS).astype(int)
        index = np.minimum(index, _NUM_BINS - 1) + _NUM_BINS * rows
        count = np.bincount(index.ravel(), minlength=_NUM_BINS * len(rows))
        return count.reshape(len(rows), _NUM_BINS) / len(x)

    p, q = histogram(p), histogram(q)
    log_ratio = np.log(np.where(p > 0, p, 1) / np.maximum(q, _MIN_PROBABILITY))
    return (p * log_ratio).sum(axis=1)


def klom(
    unlearned: np.ndarray,
    retrained: np.ndarray,
    control: np.ndarray,
    *,
    quantile: float | None = None,
    groups: Groups = None,
) -> PoolScores:
    """Returns the mean or a quantile of `klom_by_row`; see `forgetting_score`."""

    def score(pool):
        by_row = klom_by_row(pool, retrained)
        if quantile is None:
            return mean_interval(by_row, groups=groups)
        return quantile_interval(by_row, quantile, groups=groups)

    return _score_pools(score, unlearned, retrained, control)


def _score_pools(score: Callable, unlearned, retrained, control) -> PoolScores:
    """Scores the unlearned and the control models; None if a signal is not finite."""
    scores = [
        score(pool) if _are_finite(pool, retrained) else None
        for pool in (unlearned, control)
    ]
    return PoolScores(scores[0], scores[1], len(retrained))


def _are_finite(*values) -> bool:
    return all(np.isfinite(x).all() for x in values)


def _validate_signals(unlearned, retrained) -> tuple[np.ndarray, np.ndarray]:
    """Converts both to float64; raises ValueError if their shapes differ."""
    unlearned, retrained = (np.asarray(x, np.float64) for x in (unlearned, retrained))
    if unlearned.shape != retrained.shape:
        raise ValueError(
            "unlearned and retrained signals must have the same shape [M, N], not "
            f"{unlearned.shape} and {retrained.shape}"
        )
    return unlearned, retrained


def _epsilon_of_chunk(unlearned, retrained) -> np.ndarray:
    """Returns `epsilon_by_row` of one chunk of rows."""
    models = len(unlearned)
    is_swapped = np.median(retrained, axis=0) > np.median(unlearned, axis=0)
    positive = np.where(is_swapped, retrained, unlearned)
    negative = np.where(is_swapped, unlearned, retrained)
    values = np.concatenate([positive, negative])
    order = np.argsort(values, axis=0, kind="stable")
    values = np.take_along_axis(values, order, axis=0)
    # A threshold lies between two distinct neighboring values.
    num_missed = np.cumsum(order < models, axis=0)[:-1]
    fnr = num_missed / models
    fpr = (models - (np.arange(1, 2 * models)[:, None] - num_missed)) / models
    is_threshold = values[1:] > values[:-1]
    is_counted = is_threshold & (fnr > 0) & (fpr > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.maximum((1 - _DELTA - fpr) / fnr, (1 - _DELTA - fnr) / fpr)
        log_ratio = np.log(np.maximum(ratio, 1e-300))
    epsilon = np.where(is_counted, log_ratio, 0).max(axis=0)
    is_separated = (is_threshold & (fnr == 0) & (fpr == 0)).any(axis=0)
    ranges = np.sort([np.ptp(positive, axis=0), np.ptp(negative, axis=0)], axis=0)
    is_peaked = ranges[0] < 0.01 * ranges[1]
    clipped = np.clip(epsilon, 0, _MAX_EPSILON)
    return np.where(is_separated | is_peaked, _MAX_EPSILON, clipped)

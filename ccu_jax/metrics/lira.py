"""Membership inference with shadow models: U-LiRA and RMIA.

For each row, some shadow models were trained on it and then unlearned it, and some
never saw it. If a target model behaves more like the former, it memorizes the row. An
attack with few shadow models has little power, so all results state their number.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np

from ccu_jax.metrics.intervals import (
    Groups,
    Interval,
    group_indices,
    hull,
    interval_from_variance,
    proportion_interval,
    variance_of_mean,
)
from ccu_jax.metrics.roc import (
    Signals,
    auc_interval,
    placements,
    threshold_at_fpr,
    tpr_at_fpr,
)

# With fewer shadow models on a side, per-row variances are too uncertain, so all rows
# share one variance (Carlini et al. 2022).
MIN_SHADOWS_FOR_PER_ROW_VARIANCE = 64
_MIN_VARIANCE = 1e-12  # the signals of a row may be bit-identical in all models
# RMIA's parameter a: interpolates between models that saw a row and others.
_RMIA_A = 0.3


class AttackScores(NamedTuple):
    """Membership scores of rows, higher for members; NaN where undefined."""

    score: np.ndarray  # `[N]` of one target, or `[K, N]` of K targets
    num_shadows: int  # shadow models with a signal of a row, maximum over rows


class AttackResult(NamedTuple):
    """Success of an attack with shadow models; chance level is 0.5 (AUC, accuracy)."""

    auc: Interval | None
    accuracy: Interval | None  # balanced accuracy; None if the score has no threshold
    tpr_1: Interval | None  # TPR at 1 % FPR; None below 100 non-members
    tpr_01: Interval | None  # TPR at 0.1 % FPR; None below 1,000 non-members
    shadows: int  # number of shadow models


def lira(
    c_in: np.ndarray,
    c_out: np.ndarray,
    target: np.ndarray,
    *,
    per_row_variance: bool | None = None,
) -> AttackScores:
    """Returns each row's U-LiRA score: log N(target; c_in) - log N(target; c_out).

    The score of Hayes et al. 2024, N(c; in) / (N(c; in) + N(c; out)), is its sigmoid,
    which saturates. Rows above 0 are predicted to be members.

    Args:
        c_in: `[A, N]` signals (`membership.margin`) of shadow models that unlearned the
            row; NaN for other models.
        c_out: `[B, N]` signals of shadow models that never saw the row.
        target: `[N]` signals of the audited model.
        per_row_variance: whether each row has its own variances; by default if each
            side has `MIN_SHADOWS_FOR_PER_ROW_VARIANCE` models.
    """
    sides = (np.asarray(x, np.float64) for x in (c_in, c_out))
    fits = [_fit_normal(side, np.isfinite(side)) for side in sides]
    if per_row_variance is None:
        per_row_variance = _can_fit_per_row_variance(fits)
    score = _log_likelihood_ratio(
        np.asarray(target, np.float64), fits, per_row_variance
    )
    num_shadows = (fits[0][0] + fits[1][0]).max(initial=0)
    return AttackScores(score, int(num_shadows))


def lira_leave_one_out(
    signals: np.ndarray,
    unlearned: np.ndarray,
    unseen: np.ndarray,
    *,
    sets: np.ndarray | None = None,
) -> AttackScores:
    """Returns U-LiRA scores `[K, N]` of each model, with the others as shadow models.

    Args:
        signals: `[K, N]`, `membership.margin` of each model.
        unlearned: bool `[K, N]`, rows that a model was trained on and then unlearned.
        unseen: bool `[K, N]`, rows that it never saw; rows may be neither.
        sets: `[K]`; models with the same number are not each other's shadow models.
            For pairs that unlearn complementary rows, leaving out only the target would
            take a shadow model from the target's own side, which biases the score.
    """
    signals = np.asarray(signals, np.float64)
    roles = [np.asarray(x, bool) for x in (unlearned, unseen)]
    per_row_variance = _can_fit_per_row_variance(
        [_fit_normal(signals, r) for r in roles]
    )
    sets = np.arange(len(signals)) if sets is None else np.asarray(sets)
    score, num_shadows = np.full(signals.shape, np.nan), 0
    for k, target in enumerate(signals):
        is_shadow = sets != sets[k]
        c_in, c_out = (np.where(role, signals, np.nan)[is_shadow] for role in roles)
        attack = lira(c_in, c_out, target, per_row_variance=per_row_variance)
        has_role = roles[0][k] | roles[1][k]
        score[k, has_role] = attack.score[has_role]
        num_shadows = max(num_shadows, attack.num_shadows)
    return AttackScores(score, num_shadows)


def rmia(
    target: np.ndarray,
    references: np.ndarray,
    population_target: np.ndarray,
    population_references: np.ndarray,
) -> AttackScores:
    """Returns each row's offline RMIA score (Zarifzadeh et al. 2024), 0 to 1.

    With gamma = 1 it is the fraction of population rows z with p(x) / P(x) > p(z) /
    P(z), where P = (1 + a) / 2 * mean over references + (1 - a) / 2.

    Args:
        target: `[N]` `membership.true_probability` of the audited model.
        references: `[K, N]`, of models that never saw the row; NaN for other models.
        population_target: `[Z]`, of rows that no model has seen.
        population_references: `[K, Z]`.
    """
    ratio = _likelihood_ratio(target, references)
    population = _likelihood_ratio(population_target, population_references)
    population = np.sort(population[np.isfinite(population)])
    if not len(population):
        return AttackScores(np.full(len(ratio), np.nan), 0)
    # Counted by a search in the sorted population, which needs no [N, Z] array.
    fraction = np.searchsorted(population, ratio, side="left") / len(population)
    num_shadows = int(np.isfinite(references).sum(axis=0).max(initial=0))
    return AttackScores(np.where(np.isfinite(ratio), fraction, np.nan), num_shadows)


def evaluate_attack(
    scores: AttackScores,
    members: np.ndarray,
    *,
    threshold: float | None = 0.0,
    groups: Groups = None,
) -> AttackResult:
    """Measures the success of an attack on one target.

    `members` `[N]` is True for unlearned rows, False for unseen ones. Rows with a score
    above `threshold` are predicted to be members; if it is None, so is the accuracy.
    """
    is_known = ~np.isnan(scores.score)
    sides = is_known & members, is_known & ~members
    inside, outside = (scores.score[side] for side in sides)
    signals = Signals(inside, outside)
    if groups is not None:
        signals = signals._replace(groups=(groups[sides[0]], groups[sides[1]]))
    return AttackResult(
        auc_interval(signals),
        None if threshold is None else _balanced_accuracy(signals, threshold),
        tpr_at_fpr(signals, 0.01),
        tpr_at_fpr(signals, 0.001),
        scores.num_shadows,
    )


def evaluate_pool(
    scores: AttackScores, unlearned: np.ndarray, *, groups: Groups = None
) -> AttackResult:
    """Measures the mean success of `lira_leave_one_out` over all models of a pool.

    All models are scored on the same rows and are each other's shadows, so the K * N
    scores are not independent: standard errors are clustered by row (or group of rows)
    and by model (Cameron, Gelbach & Miller 2011). Thresholds of the true positive rates
    are computed on the unseen rows of all models. `unlearned` is bool `[K, N]`.
    """
    score = scores.score
    is_known, unlearned = ~np.isnan(score), np.asarray(unlearned, bool)
    inside, outside = is_known & unlearned, is_known & ~unlearned
    has_both = inside.any(axis=1) & outside.any(axis=1)
    if not has_both.any():
        return AttackResult(None, None, None, None, scores.num_shadows)
    score, inside, outside = score[has_both], inside[has_both], outside[has_both]
    placement = np.zeros_like(score)
    for k, (i, o) in enumerate(zip(inside, outside, strict=True)):
        placement[k, i], placement[k, o] = placements(score[k, i], score[k, o])
    is_correct = np.where(inside, score > 0, score <= 0)
    cluster = np.arange(score.shape[1]) if groups is None else group_indices(groups)

    def tpr(fpr):
        threshold = threshold_at_fpr(score[outside], fpr)
        if threshold is None:
            return None
        hits = score > threshold
        independent = proportion_interval(hits[inside])
        assert independent is not None  # each model has both kinds of rows
        return hull(_clustered_interval(hits, [inside], 1.0, cluster), independent)

    return AttackResult(
        _clustered_interval(placement, [inside, outside], 1.0, cluster),
        _clustered_interval(is_correct, [inside, outside], 0.5, cluster),
        tpr(0.01),
        tpr(0.001),
        scores.num_shadows,
    )


def _clustered_interval(values, sides, weight, cluster) -> Interval:
    """Returns the mean over models and sides with its confidence interval.

    The standard error is clustered by row and by model. `weight` scales each deviation
    from the mean of its side: 1 for placements, whose mean is the AUC on both sides,
    1/2 for the mean of two proportions.
    """
    num_models = len(values)
    model_means, influence = np.zeros(num_models), np.zeros(values.shape)
    for side in sides:
        count = side.sum(axis=1)
        mean = np.where(side, values, 0).sum(axis=1) / count
        deviation = (values - mean[:, None]) / (count[:, None] * num_models)
        influence += np.where(side, weight * deviation, 0)
        model_means += mean / len(sides)
    sums = np.array([np.bincount(cluster, row) for row in influence])
    by_row, by_both = (sums.sum(axis=0) ** 2).sum(), (sums**2).sum()
    by_model = variance_of_mean(model_means)
    # The variance of two pseudo-values, as in `variance_of_mean`.
    extra = 0.5 / sums.shape[1] ** 2
    variance = max(by_row + by_model - by_both, by_row, by_model) + extra
    mean = float(model_means.mean())
    return interval_from_variance(mean, variance, num_models - 1, bounds=(0.0, 1.0))


def _fit_normal(signals, is_valid):
    """Returns the count, mean and sum of squared deviations of each row, each `[N]`."""
    count = is_valid.sum(axis=0)
    mean = np.where(is_valid, signals, 0).sum(axis=0) / np.maximum(count, 1)
    squares = (np.where(is_valid, signals - mean, 0) ** 2).sum(axis=0)
    return count, mean, squares


def _can_fit_per_row_variance(fits) -> bool:
    """Returns whether all rows have enough shadow models for per-row variances."""
    # Rows without an image have no signals.
    counts = [count[count > 0] for count, *_ in fits]
    return all(len(n) and (n >= MIN_SHADOWS_FOR_PER_ROW_VARIANCE).all() for n in counts)


def _log_likelihood_ratio(target, fits, per_row_variance: bool) -> np.ndarray:
    """Returns log N(target; in) - log N(target; out) of each row; NaN if undefined."""
    logs, is_known = [], np.isfinite(target)
    for count, mean, squares in fits:
        degrees = np.maximum(count - 1, 0)
        if not per_row_variance:
            degrees, squares = degrees.sum(), squares.sum()
        is_known = is_known & (count > 0) & (degrees > 0)
        variance = np.maximum(squares / np.maximum(degrees, 1), _MIN_VARIANCE)
        logs.append(-((target - mean) ** 2) / (2 * variance) - np.log(variance) / 2)
    return np.where(is_known, logs[0] - logs[1], np.nan)


def _likelihood_ratio(target, references) -> np.ndarray:
    """Returns p(x) / P(x) of each row, as defined in `rmia`."""
    with warnings.catch_warnings():
        # NumPy warns if a row has no reference; its mean is then NaN.
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = np.nanmean(np.asarray(references, np.float64), axis=0)
    prior = (1 + _RMIA_A) / 2 * mean + (1 - _RMIA_A) / 2
    return np.asarray(target, np.float64) / prior


def _balanced_accuracy(signals: Signals, threshold: float) -> Interval | None:
    """Returns the mean of true positive and true negative rates with its interval."""
    tpr = proportion_interval(signals.members > threshold, groups=signals.groups[0])
    tnr = proportion_interval(signals.nonmembers <= threshold, groups=signals.groups[1])
    if tpr is None or tnr is None:
        return None
    value = (tpr.value + tnr.value) / 2
    down = math.hypot(tpr.value - tpr.low, tnr.value - tnr.low) / 2
    up = math.hypot(tpr.high - tpr.value, tnr.high - tnr.value) / 2
    return Interval(value, value - down, value + up)

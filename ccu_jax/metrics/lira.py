"""Attacks with shadow models: U-LiRA and RMIA, from what a pool of models says of rows.

For each row some shadow models were trained with it and then unlearned it, and some
never saw it. Where a target behaves more like the first on a row, it remembers it. All
results tell the number of shadow models: with few, an attack that finds nothing has
shown nothing.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import scipy.stats

from ccu_jax.metrics.intervals import (
    Interval,
    group_indices,
    hull,
    proportion_interval,
    symmetric_interval,
    variance_of_mean,
)
from ccu_jax.metrics.membership import threshold_at_fpr, tpr_at_fpr
from ccu_jax.metrics.roc import auc_interval, placements

# From so many shadow models a side on, each row has variances of its own; of fewer they
# are too uncertain, and all rows share one (Carlini et al. 2022).
MIN_SHADOWS_FOR_OWN_VARIANCE = 64
# No two values are taken for closer than this: a pool may say the same to the bit.
_LEAST_VARIANCE = 1e-12


class AttackScores(NamedTuple):
    """How much a target seems to remember each row, higher: more; NaN: unknown.

    `score` `[N]`, or `[K, N]` of K targets; how many shadow models are behind it, of
    the row that has most.
    """

    score: np.ndarray
    num_shadows: int


class AttackResult(NamedTuple):
    """What an attack with shadow models finds; 0.5 is nothing for AUC and accuracy.

    `tpr_1` and `tpr_01` are the true positive rates at 1 % and 0.1 % false ones, None
    where there are fewer than 100 or 1,000 non-members.
    """

    auc: Interval | None
    accuracy: Interval | None
    tpr_1: Interval | None
    tpr_01: Interval | None
    shadows: int


def lira(c_in, c_out, target, *, own_variance: bool | None = None) -> AttackScores:
    """U-LiRA (Hayes et al. 2024): log N(c; in) - log N(c; out) of each row.

    Its `expit` is the chance N(c; in) / (N(c; in) + N(c; out)) of the paper; the log
    does not run into 1 where many rows are certain. Above 0 a row is taken for one that
    was trained on and unlearned.

    Args:
        c_in: `[Ka, N]` signals (`attacks.margin`) of shadow models that unlearned the
            row. NaN: this model did not, of this row.
        c_out: `[Kb, N]` of shadow models that never saw the row. NaN likewise.
        target: `[N]` signals of the audited model.
        own_variance: whether each row has its own; None: from 64 models a side on.
    """
    c_in, c_out = np.asarray(c_in, np.float64), np.asarray(c_out, np.float64)
    sides = [(x, np.isfinite(x)) for x in (c_in, c_out)]
    fits = [_fit(values, there) for values, there in sides]
    if own_variance is None:
        own_variance = _enough(fits)
    score = _log_ratio(np.asarray(target, np.float64), *fits, own_variance)
    return AttackScores(score, int(sum(count for count, *_ in fits).max(initial=0)))


def lira_leave_one_out(
    signals, unlearned, unseen, *, own_variance: bool | None = None, sets=None
) -> AttackScores:
    """U-LiRA of each model of a pool, with all others as its shadow models, `[K, N]`.

    Args:
        signals: `[K, N]`.
        unlearned: `[K, N]`, which rows the model was trained on and then unlearned.
        unseen: `[K, N]`, which rows it never saw; rows may be neither (retained).
        own_variance: as for `lira`.
        sets: `[K]`, numbers: models of one are no shadows of each other. Where two
            share the rows between them, one unlearned what the other never saw: with
            both left out, each side has as many shadows, and where nothing is
            remembered neither is nearer to the target by that alone.
    """
    signals = np.asarray(signals, np.float64)
    roles = [np.asarray(x, bool) for x in (unlearned, unseen)]
    if own_variance is None:
        own_variance = _enough([_fit(signals, role) for role in roles])
    sets = np.arange(len(signals)) if sets is None else np.asarray(sets)
    score, most = np.full(signals.shape, np.nan), 0
    for number, target in enumerate(signals):
        others = sets != sets[number]
        sides = [np.where(role, signals, np.nan)[others] for role in roles]
        found = lira(*sides, target, own_variance=own_variance)
        known = roles[0][number] | roles[1][number]
        score[number, known] = found.score[known]
        most = max(most, found.num_shadows)
    return AttackScores(score, most)


def rmia(
    target,
    references,
    population_target,
    population_references,
    *,
    a: float = 0.3,
    gamma: float = 1.0,
) -> AttackScores:
    """RMIA, offline (Zarifzadeh et al. 2024): how many others a row beats, 0 to 1.

    The share of population rows z with [p(x) / P(x)] / [p(z) / P(z)] > gamma, where
    P = ((1 + a) / 2 * mean over references + (1 - a) / 2).

    Args:
        target: `[N]` probabilities (`true_probability`) of the audited model.
        references: `[K, N]` of reference models that never saw the row. NaN: this one
            did, or says nothing.
        population_target: `[Z]`, of rows that no model has seen.
        population_references: `[K, Z]`.
        a: how far models that have not seen a row are from those that have.
        gamma: by how much a row must beat another.
    """
    references = np.asarray(references, np.float64)
    ratio = _relative(target, references, a)
    population = gamma * _relative(population_target, population_references, a)
    population = np.sort(population[np.isfinite(population)])
    if not len(population):
        return AttackScores(np.full(len(ratio), np.nan), 0)
    # To be counted, not compared one by one: no [N, Z] is made.
    beaten = np.searchsorted(population, ratio, side="left") / len(population)
    count = int(np.isfinite(references).sum(axis=0).max(initial=0))
    return AttackScores(np.where(np.isfinite(ratio), beaten, np.nan), count)


def evaluate_attack(
    scores: AttackScores,
    members,
    *,
    threshold: float | None = 0.0,
    level: float = 0.95,
    groups=None,
) -> AttackResult:
    """What the scores `[N]` of one target find.

    Args:
        scores: of members and others.
        members: `[N]`, which rows are members, i.e. unlearned. The others are unseen.
        threshold: above which a row is taken for a member; 0 for `lira`, None where a
            score has none (`rmia`): no accuracy then.
        level: confidence of the intervals.
        groups: `[N]`, of rows that go together.
    """
    known = ~np.isnan(scores.score)
    score, members = scores.score[known], np.asarray(members, bool)[known]
    inside, outside = score[members], score[~members]
    both = None, None
    if groups is not None:
        groups = np.asarray(groups)[known]
        both = groups[members], groups[~members]
    accuracy = None
    if threshold is not None and len(inside) and len(outside):
        # Both kinds count alike, however many there are of each.
        found = (
            proportion_interval(inside > threshold, level, both[0]),
            proportion_interval(outside <= threshold, level, both[1]),
        )
        accuracy = _half_of_both(*found)
    return AttackResult(
        auc_interval(inside, outside, confidence=level, groups=both),
        accuracy,
        tpr_at_fpr(inside, outside, 0.01, confidence=level, groups=both),
        tpr_at_fpr(inside, outside, 0.001, confidence=level, groups=both),
        scores.num_shadows,
    )


def evaluate_pool(
    scores: AttackScores, unlearned, *, level: float = 0.95, groups=None
) -> AttackResult:
    """What the scores `[K, N]` of all models of a pool find (`lira_leave_one_out`).

    Means over the models. The same rows are asked of all models, and these are each
    other's shadows, so that K * N answers are not that many independent ones: the
    intervals are those of answers that go together by row (or by group of rows, where
    `groups` `[N]` are given) and by model (Cameron, Gelbach & Miller 2011). The
    thresholds of the true positive rates are one for all models, of their unseen rows
    together.
    """
    score = scores.score
    known, unlearned = ~np.isnan(score), np.asarray(unlearned, bool)
    inside, outside = known & unlearned, known & ~unlearned
    both = inside.any(axis=1) & outside.any(axis=1)
    if not both.any():
        return AttackResult(None, None, None, None, scores.num_shadows)
    score, inside, outside = score[both], inside[both], outside[both]
    placed = np.zeros_like(score)
    for place, row, i, o in zip(placed, score, inside, outside, strict=True):
        place[i], place[o] = placements(row[i], row[o])
    right = np.where(inside, score > 0, score <= 0)
    place = np.arange(score.shape[1]) if groups is None else group_indices(groups)

    def tpr(fpr):
        threshold = threshold_at_fpr(score[outside], fpr)
        if threshold is None:
            return None
        hits = score > threshold
        least = proportion_interval(hits[inside], level)
        return hull(_by_row_and_model(hits, [inside], 1.0, level, place), least)

    return AttackResult(
        _by_row_and_model(placed, [inside, outside], 1.0, level, place),
        _by_row_and_model(right, [inside, outside], 0.5, level, place),
        tpr(0.01),
        tpr(0.001),
        scores.num_shadows,
    )


def _by_row_and_model(values, sides, weight, level, groups) -> Interval:
    """The mean over models of the mean over sides of the mean of their values.

    Args:
        values: `[K, N]`, 0 to 1.
        sides: each `[K, N]`, which values are of it; some of each model.
        weight: of a value's deviation from its side's mean; of placements it is 1 on
            both sides (`auc.auc_interval`), of the mean of two shares a half.
        level: confidence of the interval.
        groups: `[N]`, numbers from 0 on.
    """
    models = len(values)
    of_models, moved = np.zeros(models), np.zeros(values.shape)
    for side in sides:
        count = side.sum(axis=1)
        mean = np.where(side, values, 0).sum(axis=1) / count
        apart = (values - mean[:, None]) / (count[:, None] * models)
        moved += np.where(side, weight * apart, 0)
        of_models += mean / len(sides)
    together = np.array([np.bincount(groups, row) for row in moved])
    by_row, alone = (together.sum(axis=0) ** 2).sum(), (together**2).sum()
    by_model = variance_of_mean(of_models)
    # What both count is counted once; and never less than if all rows said the same.
    few = 0.5 / together.shape[1] ** 2
    variance = max(by_row + by_model - alone, by_row, by_model) + few
    t = scipy.stats.t.ppf((1 + level) / 2, max(models - 1, 1))
    return symmetric_interval(of_models.mean(), t * math.sqrt(variance), 0.0, 1.0)


def _fit(values, there):
    """Count, mean and sum of squares about it of each row's values, each `[N]`."""
    count = there.sum(axis=0)
    given = np.where(there, values, 0)
    mean = given.sum(axis=0) / np.maximum(count, 1)
    squares = (np.where(there, values - mean, 0) ** 2).sum(axis=0)
    return count, mean, squares


def _enough(fits) -> bool:
    # Rows of which nobody says anything, for want of a picture, have no say.
    counts = [count[count > 0] for count, *_ in fits]
    return all(
        len(count) and (count >= MIN_SHADOWS_FOR_OWN_VARIANCE).all() for count in counts
    )


def _log_ratio(target, fit_in, fit_out, own_variance: bool):
    logs, known = [], np.isfinite(target)
    for count, mean, squares in (fit_in, fit_out):
        free = np.maximum(count - 1, 0)
        if not own_variance:
            free, squares = free.sum(), squares.sum()
        known = known & (count > 0) & (free > 0)
        variance = np.maximum(squares / np.maximum(free, 1), _LEAST_VARIANCE)
        logs.append(-((target - mean) ** 2) / (2 * variance) - np.log(variance) / 2)
    return np.where(known, logs[0] - logs[1], np.nan)


def _relative(target, references, a):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of rows that all have seen
        mean = np.nanmean(np.asarray(references, np.float64), axis=0)
    return np.asarray(target, np.float64) / ((1 + a) / 2 * mean + (1 - a) / 2)


def _half_of_both(first: Interval, second: Interval) -> Interval:
    """The mean of two independent shares; their errors add up as squares."""
    value = (first.value + second.value) / 2
    down = math.hypot(first.value - first.low, second.value - second.low) / 2
    up = math.hypot(first.high - first.value, second.high - second.value) / 2
    return Interval(value, value - down, value + up)

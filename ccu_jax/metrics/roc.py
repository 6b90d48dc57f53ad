"""AUC and true positive rates of a membership attack, also compared between models.

DeLong's interval of the AUC has a closed form; the bootstrap makes fewer assumptions.
Both cover the sampling error of the rows, given the model.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ccu_jax.metrics.intervals import (
    Groups,
    Interval,
    bootstrap_counts,
    interval_from_variance,
    proportion_interval,
    variance_of_mean,
)

_MAX_VALUES = 1 << 22  # counts in one chunk of bootstrap samples: 32 MB
_NUM_RESAMPLES, _NUM_TPR_RESAMPLES = 1000, 400


class Signals(NamedTuple):
    """Signals of a membership attack on one model, higher for members."""

    members: np.ndarray  # `[N]`, of rows that were unlearned
    nonmembers: np.ndarray  # `[M]`, of rows that no model has seen
    groups: tuple[Groups, Groups] = (None, None)  # `[N]` and `[M]` (see `intervals`)

    def is_measurable(self) -> bool:
        """Returns whether both sides have signals and all of them are finite."""
        return all(len(x) and np.isfinite(x).all() for x in self[:2])


def placements(
    members: np.ndarray, nonmembers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns DeLong's placement values, `[N]` and `[M]`, whose means are the AUC.

    A member's is the fraction of non-members below it, a non-member's the fraction of
    members above it; ties count 1/2.
    """
    above = 1 - _fraction_below(nonmembers, members)
    return _fraction_below(members, nonmembers), above


def auc_interval(signals: Signals, confidence: float = 0.95) -> Interval | None:
    """Returns the AUC with the interval of DeLong, DeLong & Clarke-Pearson (1988).

    With groups, the interval is that of Obuchowski (1997). It is widened by the
    pseudo-values of `variance_of_mean`, without which an AUC of 1 would have a standard
    error of 0 even with few rows. None if the signals are not measurable.
    """
    if not signals.is_measurable():
        return None
    values = placements(signals.members, signals.nonmembers)
    return _delong_interval(values, signals.groups, confidence, (0.0, 1.0))


def auc_difference(
    model: Signals, reference: Signals, confidence: float = 0.95
) -> Interval | None:
    """Returns a model's AUC minus a reference's on the same rows (DeLong et al. 1988).

    The difference is paired: its interval is narrower than those of the two AUCs, which
    must not be compared with each other. None if either model is not measurable.

    Raises:
        ValueError: model and reference have different numbers of rows.
    """
    sizes = [[len(x) for x in signals[:2]] for signals in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"model and reference have different numbers of rows: {sizes}")
    if not (model.is_measurable() and reference.is_measurable()):
        return None
    pairs = zip(placements(*model[:2]), placements(*reference[:2]), strict=True)
    differences = tuple(a - b for a, b in pairs)
    return _delong_interval(differences, model.groups, confidence, (-1.0, 1.0))


def auc_bootstrap(signals: Signals) -> Interval | None:
    """Returns the AUC with its 95 % percentile bootstrap interval (Efron 1979).

    Members and non-members are resampled separately. The interval of an AUC of 0 or 1
    has no width, unlike that of `auc_interval`. None if the signals are not measurable.
    """
    if not signals.is_measurable():
        return None
    samples = _auc_of_samples(signals, _NUM_RESAMPLES)
    low, high = np.quantile(samples, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    value = placements(signals.members, signals.nonmembers)[0].mean()
    return Interval(float(value), float(low), float(high))


def tpr_at_fpr(
    signals: Signals, fpr: float, confidence: float = 0.95
) -> Interval | None:
    """Returns the true positive rate at a false positive rate of at most `fpr`.

    Unlike the AUC, it reveals memorization of only a few rows (Carlini et al. 2022).
    The Clopper-Pearson interval is conditional on the threshold, whose sampling error
    is not included. None if there are fewer than 1 / fpr non-members, or no members.
    """
    threshold = threshold_at_fpr(signals.nonmembers, fpr)
    if threshold is None or not np.isfinite(signals.members).all():
        return None
    hits = signals.members > threshold
    return proportion_interval(hits, confidence, signals.groups[0])


def tpr_difference(
    model: Signals, reference: Signals, fpr: float, confidence: float = 0.95
) -> Interval | None:
    """Returns a model's `tpr_at_fpr` minus a reference's on the same rows.

    Each model has its own threshold, which depends on a few non-members. The standard
    error is that of a stratified paired bootstrap that recomputes both thresholds, with
    the pseudo-values of `variance_of_mean`. None if a rate is None.
    """
    rates = [tpr_at_fpr(signals, fpr) for signals in (model, reference)]
    if rates[0] is None or rates[1] is None:
        return None

    def difference(*counts):
        return np.subtract(
            *(_tpr_of_samples(x, counts, fpr) for x in (model, reference))
        )

    differences = _bootstrap(model, _NUM_TPR_RESAMPLES, difference)
    extra = variance_of_mean(np.zeros(len(model.members)), 2.0, model.groups[0])
    variance = float(differences.var(ddof=1)) + extra
    mean = rates[0].value - rates[1].value
    return interval_from_variance(mean, variance, None, confidence, (-1.0, 1.0))


def threshold_at_fpr(nonmembers: np.ndarray, fpr: float) -> float | None:
    """Returns the lowest threshold whose false positive rate is at most `fpr`.

    None if there are fewer than 1 / fpr non-members `[M]` or one is not finite.
    """
    # 1e-9, because 0.29 * 100 is below 29 in floating point.
    allowed = int(np.floor(fpr * len(nonmembers) + 1e-9))
    if allowed < 1 or not np.isfinite(nonmembers).all():
        return None
    if allowed >= len(nonmembers):
        return -np.inf
    rank = len(nonmembers) - allowed - 1
    return float(np.partition(nonmembers, rank)[rank])


def _bootstrap(signals: Signals, resamples: int, score: Callable) -> np.ndarray:
    """Returns the score of each bootstrap sample, `[resamples]`.

    `score` maps the counts of the rows in B samples, `[B, N]` and `[B, M]`, to `[B]`.
    """
    rng = np.random.default_rng(0)
    num_rows = len(signals.members), len(signals.nonmembers)
    step = max(_MAX_VALUES // sum(num_rows), 1)
    scores = []
    for start in range(0, resamples, step):
        counts = (
            bootstrap_counts(rng, min(step, resamples - start), n, groups)
            for n, groups in zip(num_rows, signals.groups, strict=True)
        )
        scores.append(score(*counts))
    return np.concatenate(scores)


def _auc_of_samples(signals: Signals, resamples: int) -> np.ndarray:
    """Returns the AUC of each bootstrap sample, `[resamples]`; sorts only once."""
    order = np.argsort(signals.nonmembers, kind="stable")
    rising = signals.nonmembers[order]
    left, right = (
        np.searchsorted(rising, signals.members, side) for side in ("left", "right")
    )

    def auc(member_counts, nonmember_counts):
        below = np.zeros((len(member_counts), len(order) + 1), np.int64)
        np.cumsum(nonmember_counts[:, order], axis=1, out=below[:, 1:])
        wins = ((below[:, left] + below[:, right]) * member_counts).sum(axis=1)
        pairs = member_counts.sum(axis=1) * nonmember_counts.sum(axis=1)
        return wins / (2 * pairs)

    return _bootstrap(signals, resamples, auc)


def _tpr_of_samples(signals: Signals, counts, fpr: float) -> np.ndarray:
    """Returns `tpr_at_fpr` of B bootstrap samples, from counts `[B, N]`, `[B, M]`."""
    order = np.argsort(-signals.nonmembers, kind="stable")
    num_above = np.cumsum(counts[1][:, order], axis=1)
    allowed = np.floor(fpr * num_above[:, -1:] + 1e-9)
    # The highest non-member that may not exceed the threshold.
    threshold = signals.nonmembers[order][np.argmax(num_above > allowed, axis=1)]
    hits = (signals.members > threshold[:, None]) * counts[0]
    return hits.sum(axis=1) / counts[0].sum(axis=1)


def _fraction_below(values, among) -> np.ndarray:
    """Returns the fraction of `among` below each value; ties count 1/2."""
    among = np.sort(among)
    left, right = (np.searchsorted(among, values, side) for side in ("left", "right"))
    return (left + right) / (2 * len(among))


def _delong_interval(values, groups, confidence: float, bounds) -> Interval:
    """Returns the interval of the mean of placement values, or of their differences."""
    variance = sum(
        variance_of_mean(side, span=1.0, groups=side_groups)
        for side, side_groups in zip(values, groups, strict=True)
    )
    mean = float(values[0].mean())
    return interval_from_variance(mean, variance, None, confidence, bounds)

"""AUC of a membership attack, and its difference between two models.

DeLong's interval is a formula; the bootstrap makes fewer assumptions. Both cover the
sampling error of the rows, given the model.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats

from ccu_jax.metrics.intervals import (
    Groups,
    Interval,
    bootstrap_counts,
    symmetric_interval,
    variance_of_mean,
)

MAX_VALUES = 1 << 22  # of a table of bootstrap samples: 32 MB
_NUM_RESAMPLES = 1000


class Signals(NamedTuple):
    """Signals of a membership attack on one model, higher for members.

    Attributes:
        members: `[N]`, of rows that were unlearned.
        nonmembers: `[M]`, of rows that no model has seen.
        groups: `[N]` and `[M]` (see `intervals`), or None.
    """

    members: np.ndarray
    nonmembers: np.ndarray
    groups: tuple[Groups, Groups] = (None, None)

    def is_measurable(self) -> bool:
        """Returns whether there are members and non-members and all are finite."""
        return all(len(x) and np.isfinite(x).all() for x in self[:2])


def placements(
    members: np.ndarray, nonmembers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns DeLong's placement values, `[N]` and `[M]`, whose means are the AUC.

    Those of a member are the fraction of non-members below it, those of a non-member
    the fraction of members above it; ties count half.
    """
    above = 1 - _fraction_below(nonmembers, members)
    return _fraction_below(members, nonmembers), above


def auc_interval(signals: Signals, confidence: float = 0.95) -> Interval | None:
    """Returns the AUC with the interval of DeLong, DeLong & Clarke-Pearson (1988).

    With groups that of Obuchowski (1997). It is widened by the two extra values of
    `variance_of_mean`, without which an AUC of 1 would have no error however few rows
    there are. None if the signals are not measurable.
    """
    if not signals.is_measurable():
        return None
    placed = placements(signals.members, signals.nonmembers)
    half_width = _half_width(placed, confidence, signals.groups)
    return symmetric_interval(placed[0].mean(), half_width, (0.0, 1.0))


def auc_difference(
    model: Signals, reference: Signals, confidence: float = 0.95
) -> Interval | None:
    """Returns a model's AUC minus a reference's on the same rows (DeLong et al. 1988).

    The difference is paired: its interval is narrower than those of the two AUCs, which
    must not be compared with each other. None if the signals of one are not measurable.

    Raises:
        ValueError: model and reference have different numbers of rows.
    """
    sizes = [[len(x) for x in signals[:2]] for signals in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"model and reference must have the same rows, not {sizes}")
    if not (model.is_measurable() and reference.is_measurable()):
        return None
    placed = zip(placements(*model[:2]), placements(*reference[:2]), strict=True)
    difference = tuple(a - b for a, b in placed)
    half_width = _half_width(difference, confidence, model.groups)
    return symmetric_interval(difference[0].mean(), half_width, (-1.0, 1.0))


def auc_bootstrap(signals: Signals) -> Interval | None:
    """Returns the AUC with a percentile bootstrap interval of 95 % (Efron 1979).

    Members and non-members are resampled separately. The interval of an AUC of 0 or 1
    has no width, unlike that of `auc_interval`. None if the signals are not measurable.
    """
    if not signals.is_measurable():
        return None
    samples = _resample_auc(signals, _NUM_RESAMPLES)
    low, high = np.quantile(samples, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    value = placements(signals.members, signals.nonmembers)[0].mean()
    return Interval(float(value), float(low), float(high))


def _resample_auc(signals: Signals, resamples: int) -> np.ndarray:
    """Returns the AUC of each bootstrap sample, `[resamples]`, sorting only once."""
    members, nonmembers, groups = signals
    order = np.argsort(nonmembers, kind="stable")
    rising = nonmembers[order]
    left, right = (np.searchsorted(rising, members, s) for s in ("left", "right"))
    num_rows = len(members), len(nonmembers)
    rng = np.random.default_rng(0)
    step = max(MAX_VALUES // sum(num_rows), 1)
    pieces = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        member_counts, nonmember_counts = (
            bootstrap_counts(rng, size, n, of)
            for n, of in zip(num_rows, groups, strict=True)
        )
        below = np.zeros((size, num_rows[1] + 1), np.int64)
        np.cumsum(nonmember_counts[:, order], axis=1, out=below[:, 1:])
        wins = ((below[:, left] + below[:, right]) * member_counts).sum(axis=1)
        pairs = member_counts.sum(axis=1) * nonmember_counts.sum(axis=1)
        pieces.append(wins / (2 * pairs))
    return np.concatenate(pieces)


def _fraction_below(values, among) -> np.ndarray:
    among = np.sort(among)
    left, right = (np.searchsorted(among, values, side) for side in ("left", "right"))
    return (left + right) / (2 * len(among))


def _half_width(placed, confidence: float, groups) -> float:
    variance = sum(
        variance_of_mean(side, span=1.0, groups=of)
        for side, of in zip(placed, groups, strict=True)
    )
    return float(scipy.stats.norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)

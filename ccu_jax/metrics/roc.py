"""AUC of an attack, and the difference of two models', with intervals.

Two ways to the interval: DeLong's is a formula and takes milliseconds; the bootstrap
assumes less. Both tell the chance of the draw of the rows, given the model.
"""

import math

import numpy as np
import scipy.stats

from ccu_jax.metrics.intervals import (
    Interval,
    bootstrap_counts,
    symmetric_interval,
    variance_of_mean,
)

# Resampled rows at once: 32 MB a table.
_AT_ONCE = 1 << 22


def placements(members, others) -> tuple[np.ndarray, np.ndarray]:
    """Each member's share of others below it, and each other's of members above it.

    Ties count half. The mean of either is the AUC.
    """
    members, others = np.asarray(members), np.asarray(others)
    return _below(members, others), 1 - _below(others, members)


def auc_interval(
    members, others, *, confidence: float = 0.95, groups=(None, None)
) -> Interval | None:
    """AUC with the interval of DeLong, DeLong & Clarke-Pearson (1988).

    With a margin for few rows (`intervals.variance_of_mean`): without it an AUC of 1
    would be certain, of however few rows.

    Args:
        members: `[N]` values of rows that were unlearned; higher: surer.
        others: `[M]` values of rows that no model has seen.
        confidence: of the interval.
        groups: `[N]` and `[M]`, of rows that go together (Obuchowski 1997).

    Returns:
        None where there are no members or no others, or a value is no number.
    """
    if not _measurable(members, others):
        return None
    parts = placements(members, others)
    return symmetric_interval(
        parts[0].mean(), _half(parts, confidence, groups), 0.0, 1.0
    )


def auc_difference(
    members,
    others,
    reference_members,
    reference_others,
    *,
    confidence: float = 0.95,
    groups=(None, None),
) -> Interval | None:
    """A model's AUC minus a reference's on the same rows, by DeLong et al. (1988).

    What both find hard or easy cancels out: the interval is narrower than those of the
    two, which must not be compared with each other.

    Args:
        members: `[N]` the model's values of rows that were unlearned.
        others: `[M]` and of rows that no model has seen.
        reference_members: `[N]` the reference's values of the same rows.
        reference_others: `[M]` likewise.
        confidence: of the interval.
        groups: as for `auc_interval`.
    """
    _same_rows(members, others, reference_members, reference_others)
    if not _measurable(members, others, reference_members, reference_others):
        return None
    model = placements(members, others)
    reference = placements(reference_members, reference_others)
    parts = tuple(a - b for a, b in zip(model, reference, strict=True))
    return symmetric_interval(
        parts[0].mean(), _half(parts, confidence, groups), -1.0, 1.0
    )


def auc_bootstrap(
    members,
    others,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    groups=(None, None),
) -> Interval | None:
    """AUC with a percentile interval of a stratified bootstrap (Efron 1979).

    Members and others are drawn each among themselves. An AUC of 0 or 1 has no width
    here; `auc_interval` gives it some. Args as there.
    """
    if not _measurable(members, others):
        return None
    found = _resampled([(members, others)], resamples, seed, groups)[0]
    return _percentiles(placements(members, others)[0].mean(), found, confidence)


def _below(values, among):
    """The share of `among` below each value, ties counting half."""
    among = np.sort(among)
    left, right = (np.searchsorted(among, values, side) for side in ("left", "right"))
    return (left + right) / (2 * len(among))


def _half(parts, confidence: float, groups) -> float:
    """Half the interval's width, from the placements or their differences."""
    variance = sum(
        variance_of_mean(part, span=1.0, groups=of)
        for part, of in zip(parts, groups, strict=True)
    )
    return scipy.stats.norm.ppf((1 + confidence) / 2) * math.sqrt(variance)


def _percentiles(value, found, confidence: float) -> Interval:
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(value), float(low), float(high))


def _resampled(pairs, resamples: int, seed: int, groups=(None, None)) -> np.ndarray:
    """AUCs of resampled rows, the same rows for each pair `[len(pairs), resamples]`.

    How often each row was drawn is counted; the values are sorted once.
    """
    members, others = (len(x) for x in pairs[0])
    plans = []
    for of_members, of_others in pairs:
        order = np.argsort(of_others, kind="stable")
        ordered = np.asarray(of_others)[order]
        ends = [np.searchsorted(ordered, of_members, s) for s in ("left", "right")]
        plans.append((order, *ends))
    rng = np.random.default_rng(seed)
    step = max(_AT_ONCE // (members + others), 1)
    pieces = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = [
            bootstrap_counts(rng, rows, count, of)
            for count, of in zip((members, others), groups, strict=True)
        ]
        pieces.append([_weighted(*plan, *drawn) for plan in plans])
    return np.concatenate(pieces, axis=1)


def _weighted(order, left, right, members, others) -> np.ndarray:
    """AUCs of rows that count `members [B, N]` and `others [B, M]` times."""
    below = np.zeros((len(others), others.shape[1] + 1), np.int64)
    np.cumsum(others[:, order], axis=1, out=below[:, 1:])
    won = ((below[:, left] + below[:, right]) * members).sum(axis=1)
    return won / (2 * members.sum(axis=1) * others.sum(axis=1))


def _measurable(*arrays) -> bool:
    return all(len(x) and np.isfinite(x).all() for x in arrays)


def _same_rows(members, others, reference_members, reference_others):
    if len(members) != len(reference_members) or len(others) != len(reference_others):
        raise ValueError(
            "model and reference must have values of the same rows, not of "
            f"{len(members)} and {len(reference_members)} members, "
            f"{len(others)} and {len(reference_others)} others"
        )

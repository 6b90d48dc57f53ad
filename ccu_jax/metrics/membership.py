"""Membership inference from the outputs of one model: signals, and rates of attacks.

A signal is one number for each row, higher for rows the model was trained on. An attack
compares the signals of members (unlearned rows) with those of non-members (rows that no
model has seen).
"""

import math

import numpy as np
import scipy.special
import scipy.stats

from ccu_jax.metrics.intervals import (
    Interval,
    bootstrap_counts,
    proportion_interval,
    symmetric_interval,
    variance_of_mean,
)
from ccu_jax.metrics.roc import MAX_VALUES, Signals


def membership_signals(
    logits: np.ndarray, labels: np.ndarray, multi_label: bool
) -> dict[str, np.ndarray]:
    """Returns all signals by name, each `[N]`; NaN if a logit is not finite.

    Args:
        logits: `[N, K]`.
        labels: `[N, K]`.
        multi_label: whether rows have several labels.
    """
    if not np.isfinite(logits).all():
        missing = np.full(len(logits), np.nan)
        return dict.fromkeys(("loss", "margin", "entropy", "modified_entropy"), missing)
    return {
        "loss": log_likelihood(logits, labels, multi_label),
        "margin": margin(logits, labels, multi_label),
        "entropy": negative_entropy(logits, multi_label),
        "modified_entropy": negative_modified_entropy(logits, labels, multi_label),
    }


def log_likelihood(
    logits: np.ndarray, labels: np.ndarray, multi_label: bool
) -> np.ndarray:
    """Returns the log-probability of the labels, minus the loss, `[N]`.

    For several labels the sum over labels.
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        return -np.logaddexp(0, np.where(labels > 0, -logits, logits)).sum(axis=1)
    return (scipy.special.log_softmax(logits, axis=1) * labels).sum(axis=1)


def true_probability(
    logits: np.ndarray, labels: np.ndarray, multi_label: bool
) -> np.ndarray:
    """Returns the probability of the labels, `[N]`.

    For several labels their geometric mean: the product of many would vanish.
    """
    total = log_likelihood(logits, labels, multi_label)
    return np.exp(total / labels.shape[1] if multi_label else total)


def margin(logits: np.ndarray, labels: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns the log-odds of the label, `[N]` (Carlini et al. 2022).

    Single-label: log p_y - log sum_{j != y} p_j. Multi-label: the mean over labels of
    the log-odds of the true value.
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        return np.where(labels > 0, logits, -logits).mean(axis=1)
    log_p, log_other = _log_probabilities(logits)
    return ((log_p - log_other) * labels).sum(axis=1)


def negative_entropy(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns sum_j p_j log p_j, `[N]` (Shokri et al. 2017).

    For several labels the sum over labels of that of each binary prediction.
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        yes, no = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
        return (np.exp(yes) * yes + np.exp(no) * no).sum(axis=1)
    log_p = scipy.special.log_softmax(logits, axis=1)
    return (np.exp(log_p) * log_p).sum(axis=1)


def negative_modified_entropy(
    logits: np.ndarray, labels: np.ndarray, multi_label: bool
) -> np.ndarray:
    """Returns the negative modified entropy, `[N]` (Song & Mittal 2021).

    (1 - p_y) log p_y + sum_{j != y} p_j log(1 - p_j). For a binary label, with q the
    probability of the true value, that is 2 (1 - q) log q; summed over labels. Some
    public code has log p_j in place of log(1 - p_j).
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        signed = np.where(labels > 0, logits, -logits)
        log_q, log_wrong = -np.logaddexp(0, -signed), -np.logaddexp(0, signed)
        return 2 * (np.exp(log_wrong) * log_q).sum(axis=1)
    log_p, log_other = _log_probabilities(logits)
    wrong = np.exp(log_p) * log_other
    return np.where(labels > 0, np.exp(log_other) * log_p, wrong).sum(axis=1)


def tpr_at_fpr(
    signals: Signals, fpr: float, confidence: float = 0.95
) -> Interval | None:
    """Returns the true positive rate at a false positive rate of at most `fpr`.

    Unlike the AUC it shows models that remember few rows well (Carlini et al. 2022).
    The Clopper-Pearson interval is that of the threshold in use; the sampling error of
    the threshold itself is not included. None if there are fewer than 1 / fpr
    non-members, or no members.
    """
    threshold = threshold_at_fpr(signals.nonmembers, fpr)
    if threshold is None or not np.isfinite(signals.members).all():
        return None
    hits = signals.members > threshold
    return proportion_interval(hits, confidence, signals.groups[0])


def tpr_difference(
    model: Signals,
    reference: Signals,
    fpr: float,
    confidence: float = 0.95,
    resamples: int = 400,
) -> Interval | None:
    """Returns a model's `tpr_at_fpr` minus a reference's on the same rows.

    Each has its own threshold, which depends on a handful of non-members. The standard
    error is that of a stratified paired bootstrap that recomputes both thresholds, with
    the two extra values of `intervals.variance_of_mean`. None if a rate is None.
    """
    rates = [tpr_at_fpr(signals, fpr) for signals in (model, reference)]
    if rates[0] is None or rates[1] is None:
        return None
    rng = np.random.default_rng(0)
    num_rows = len(model.members), len(model.nonmembers)
    step = max(MAX_VALUES // sum(num_rows), 1)
    differences = []
    for start in range(0, resamples, step):
        counts = [
            bootstrap_counts(rng, min(step, resamples - start), n, of)
            for n, of in zip(num_rows, model.groups, strict=True)
        ]
        one, other = (_resampled_tpr(x, counts, fpr) for x in (model, reference))
        differences.append(one - other)
    extra = variance_of_mean(np.zeros(num_rows[0]), 2.0, model.groups[0])
    variance = float(np.concatenate(differences).var(ddof=1)) + extra
    half_width = float(scipy.stats.norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)
    difference = rates[0].value - rates[1].value
    return symmetric_interval(difference, half_width, (-1.0, 1.0))


def threshold_at_fpr(nonmembers: np.ndarray, fpr: float) -> float | None:
    """Returns the lowest threshold that at most a fraction `fpr` of `[M]` exceeds.

    None if there are fewer than 1 / fpr values or one is not finite.
    """
    # 0.29 * 100 is below 29 in floating point.
    allowed = int(np.floor(fpr * len(nonmembers) + 1e-9))
    if allowed < 1 or not np.isfinite(nonmembers).all():
        return None
    if allowed >= len(nonmembers):
        return -np.inf
    rank = len(nonmembers) - allowed - 1
    return float(np.partition(nonmembers, rank)[rank])


def _resampled_tpr(signals: Signals, counts, fpr: float) -> np.ndarray:
    """Returns `tpr_at_fpr` of B bootstrap samples, from counts `[B, N]`, `[B, M]`."""
    order = np.argsort(-signals.nonmembers, kind="stable")
    num_above = np.cumsum(counts[1][:, order], axis=1)
    allowed = np.floor(fpr * num_above[:, -1:] + 1e-9)
    # In falling order, the first non-member that is one too many.
    threshold = signals.nonmembers[order][np.argmax(num_above > allowed, axis=1)]
    hits = (signals.members > threshold[:, None]) * counts[0]
    return hits.sum(axis=1) / counts[0].sum(axis=1)


def _log_probabilities(logits) -> tuple[np.ndarray, np.ndarray]:
    """Returns log p and log(1 - p), `[N, K]`, the latter precise also for p near 1."""
    log_p = scipy.special.log_softmax(logits, axis=1)
    rows, top = np.arange(len(log_p)), log_p.argmax(axis=1)
    rest = log_p.copy()
    rest[rows, top] = -np.inf
    # Only the largest p exceeds a half, so log1p is precise for all others.
    log_other = np.log1p(-np.exp(rest))
    log_other[rows, top] = scipy.special.logsumexp(rest, axis=1)
    return log_p, log_other

"""Signals of membership inference from the outputs of one model.

A signal is one number for each row, higher for rows the model was trained on. Logits
and labels are `[N, K]`; with `multi_label` rows have several labels. `roc.py` compares
the signals of members (unlearned rows) with those of rows that no model has seen.
"""

import numpy as np
import scipy.special


def membership_signals(
    logits: np.ndarray, labels: np.ndarray, multi_label: bool
) -> dict[str, np.ndarray]:
    """Returns all signals by name, each `[N]`; NaN if a logit is not finite."""
    if not np.isfinite(logits).all():
        missing = np.full(len(logits), np.nan)
        return dict.fromkeys(("loss", "margin", "entropy", "modified_entropy"), missing)
    return {
        "loss": log_likelihood(logits, labels, multi_label),
        "margin": margin(logits, labels, multi_label),
        "entropy": negative_entropy(logits, multi_label),
        "modified_entropy": negative_modified_entropy(logits, labels, multi_label),
    }


def log_distribution(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns log-probabilities `[N, K]`; with `multi_label`, `[N, K, 2]` (no, yes)."""
    logits = np.asarray(logits, np.float64)
    if multi_label:
        return -np.logaddexp(0, np.stack([logits, -logits], axis=-1))
    return scipy.special.log_softmax(logits, axis=1)


def log_likelihood(
    logits: np.ndarray, labels: np.ndarray, multi_label: bool
) -> np.ndarray:
    """Returns the log-probability of the labels, which is the negative loss, `[N]`.

    Multi-label: the sum over labels.
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        return -np.logaddexp(0, np.where(labels > 0, -logits, logits)).sum(axis=1)
    return (scipy.special.log_softmax(logits, axis=1) * labels).sum(axis=1)


def true_probability(
    logits: np.ndarray, labels: np.ndarray, multi_label: bool
) -> np.ndarray:
    """Returns the probability of the labels, `[N]`.

    Multi-label: the geometric mean over labels, because a product would vanish.
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
    log_p, log_complement = _log_probabilities(logits)
    return ((log_p - log_complement) * labels).sum(axis=1)


def negative_entropy(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns sum_j p_j log p_j, `[N]` (Shokri et al. 2017).

    Multi-label: the sum over labels of the negative entropy of each binary prediction.
    """
    log_p = log_distribution(logits, multi_label)
    negative = (np.exp(log_p) * log_p).sum(axis=-1)
    return negative.sum(axis=1) if multi_label else negative


def negative_modified_entropy(
    logits: np.ndarray, labels: np.ndarray, multi_label: bool
) -> np.ndarray:
    """Returns the negative modified entropy, `[N]` (Song & Mittal 2021).

    Single-label: (1 - p_y) log p_y + sum_{j != y} p_j log(1 - p_j). Multi-label: the
    sum over labels of 2 (1 - q) log q, with q the probability of the true value. Some
    public code has log p_j in place of log(1 - p_j).
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        signed = np.where(labels > 0, logits, -logits)
        log_q, log_wrong = -np.logaddexp(0, -signed), -np.logaddexp(0, signed)
        return 2 * (np.exp(log_wrong) * log_q).sum(axis=1)
    log_p, log_complement = _log_probabilities(logits)
    wrong = np.exp(log_p) * log_complement
    return np.where(labels > 0, np.exp(log_complement) * log_p, wrong).sum(axis=1)


def _log_probabilities(logits) -> tuple[np.ndarray, np.ndarray]:
    """Returns log p and log(1 - p), `[N, K]`, the latter precise even for p near 1."""
    log_p = scipy.special.log_softmax(logits, axis=1)
    rows, top = np.arange(len(log_p)), log_p.argmax(axis=1)
    rest = log_p.copy()
    rest[rows, top] = -np.inf
    # Only the largest p exceeds a half, so log1p is precise for all others.
    log_complement = np.log1p(-np.exp(rest))
    log_complement[rows, top] = scipy.special.logsumexp(rest, axis=1)
    return log_p, log_complement

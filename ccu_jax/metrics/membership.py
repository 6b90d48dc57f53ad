"""What a model's outputs tell of whether it was trained on a row: signals and attacks.

A signal is one number for each row, higher where a model behaves as it does on rows it
knows. An attack compares those of unlearned rows with those of rows no model has seen.
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

# Values of resampled rows at once: 32 MB a table.
_AT_ONCE = 1 << 22


def membership_signals(logits, labels, multi_label: bool) -> dict[str, np.ndarray]:
    """All signals `[N]` of logits `[N, K]` and labels `[N, K]`, by name.

    A model that says no numbers has none: NaN for all rows.
    """
    if not np.isfinite(logits).all():
        nothing = np.full(len(logits), np.nan)
        return dict.fromkeys(("loss", "margin", "entropy", "modified_entropy"), nothing)
    given = logits, labels, multi_label
    return {
        "loss": log_likelihood(*given),
        "margin": margin(*given),
        "entropy": negative_entropy(logits, multi_label),
        "modified_entropy": negative_modified_entropy(*given),
    }


def margin(logits, labels, multi_label: bool) -> np.ndarray:
    """How far the truth is ahead, `[N]` (Carlini et al. 2022).

    One label: log p_y - log sum_{j != y} p_j, the log-odds of the true class. Several:
    the mean over labels of the log-odds of the true value, which are the logits with
    the sign of the truth.
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        return np.where(labels > 0, logits, -logits).mean(axis=1)
    log_p, log_other = _log_softmax(logits)
    return ((log_p - log_other) * labels).sum(axis=1)


def negative_entropy(logits, multi_label: bool) -> np.ndarray:
    """How decided a model is, whatever the truth, `[N]`.

    sum_j p_j log p_j (Shokri et al. 2017), or its sum over labels, each true or not.
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        yes, no = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
        return (np.exp(yes) * yes + np.exp(no) * no).sum(axis=1)
    log_p = scipy.special.log_softmax(logits, axis=1)
    return (np.exp(log_p) * log_p).sum(axis=1)


def negative_modified_entropy(logits, labels, multi_label: bool) -> np.ndarray:
    """How decided a model is for the truth, `[N]` (Song & Mittal 2021).

    (1 - p_y) log p_y + sum_{j != y} p_j log(1 - p_j). A label of several is such a
    question with two answers, which gives 2 (1 - q) log q with q the probability of the
    true value; they are summed. Public code that has log p_j instead of log(1 - p_j)
    tells something else.
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        signed = np.where(labels > 0, logits, -logits)
        log_q, log_wrong = -np.logaddexp(0, -signed), -np.logaddexp(0, signed)
        return 2 * (np.exp(log_wrong) * log_q).sum(axis=1)
    log_p, log_other = _log_softmax(logits)
    wrong = np.exp(log_p) * log_other
    return np.where(labels > 0, np.exp(log_other) * log_p, wrong).sum(axis=1)


def tpr_at_fpr(
    members, others, fpr: float, *, confidence: float = 0.95, groups=(None, None)
) -> Interval | None:
    """The share of members found when at most `fpr` of the others are taken for some.

    It sees a model that remembers few rows, but these well, which an AUC hardly does
    (Carlini et al. 2022). With the interval of Clopper & Pearson for the threshold at
    hand; that the threshold depends on the others drawn is not in it. The attack that
    looks for over-forgotten rows is the same of both signals with the sign changed.

    Args:
        members: `[N]` signals of unlearned rows.
        others: `[M]` signals of rows that no model has seen.
        fpr: the false positive rate, 0 to 1.
        confidence: of the interval.
        groups: `[N]` and `[M]`, of rows that go together.

    Returns:
        None where it cannot be measured at this sample size: there are fewer than
        1 / fpr others, or no members.
    """
    members, others = np.asarray(members), np.asarray(others)
    threshold = threshold_at_fpr(others, fpr)
    if threshold is None or not np.isfinite(members).all():
        return None
    return proportion_interval(members > threshold, confidence, groups[0])


def tpr_difference(
    members,
    others,
    reference_members,
    reference_others,
    fpr: float,
    *,
    confidence: float = 0.95,
    resamples: int = 400,
    seed: int = 0,
    groups=(None, None),
) -> Interval | None:
    """A model's `tpr_at_fpr` minus a reference's on the same rows, paired.

    Each at its own threshold. The standard error is that of a stratified bootstrap in
    which both thresholds are found anew each time: they hang on a handful of the
    others, which weighs more than the members do. With the margin for few rows of
    `intervals.variance_of_mean`. None where one of both cannot be measured.
    """
    pairs = (members, others), (reference_members, reference_others)
    pairs = [tuple(np.asarray(side) for side in pair) for pair in pairs]
    found = [tpr_at_fpr(*pair, fpr) for pair in pairs]
    if None in found:
        return None
    rng = np.random.default_rng(seed)
    count = [len(side) for side in pairs[0]]
    pieces, step = [], max(_AT_ONCE // sum(count), 1)
    for start in range(0, resamples, step):
        often = [
            bootstrap_counts(rng, min(step, resamples - start), n, of)
            for n, of in zip(count, groups, strict=True)
        ]
        rates = [_resampled_tpr(*pair, *often, fpr) for pair in pairs]
        pieces.append(rates[0] - rates[1])
    margin = variance_of_mean(np.zeros(count[0]), 2.0, groups[0])
    variance = np.concatenate(pieces).var(ddof=1) + margin
    half = scipy.stats.norm.ppf((1 + confidence) / 2) * math.sqrt(variance)
    return symmetric_interval(found[0].value - found[1].value, half, -1.0, 1.0)


def _resampled_tpr(members, others, often_members, often_others, fpr: float):
    """`tpr_at_fpr` of rows that come `[B, N]` and `[B, M]` times, `[B]`."""
    order = np.argsort(-others, kind="stable")
    above = np.cumsum(often_others[:, order], axis=1)
    allowed = np.floor(fpr * above[:, -1:] + 1e-9)
    # The first of the others, from the highest on, that is one too many.
    threshold = others[order][np.argmax(above > allowed, axis=1)]
    hits = (members > threshold[:, None]) * often_members
    return hits.sum(axis=1) / often_members.sum(axis=1)


def threshold_at_fpr(others, fpr: float) -> float | None:
    """The lowest threshold that at most the share `fpr` of `others [M]` is above."""
    # Rounding: 0.07 * 100 is more than 7, 0.29 * 100 less than 29.
    allowed = int(np.floor(fpr * len(others) + 1e-9))
    if allowed < 1 or not np.isfinite(others).all():
        return None
    if allowed >= len(others):
        return -np.inf
    place = len(others) - allowed - 1
    return float(np.partition(others, place)[place])


def _log_softmax(logits) -> tuple[np.ndarray, np.ndarray]:
    """log p and log(1 - p), `[N, K]`, the latter exact where p is nearly 1."""
    log_p = scipy.special.log_softmax(logits, axis=1)
    rows, top = np.arange(len(log_p)), log_p.argmax(axis=1)
    rest = log_p.copy()
    rest[rows, top] = -np.inf
    # No p but the largest is over a half, so that log1p is exact for all others.
    log_other = np.log1p(-np.exp(rest))
    log_other[rows, top] = scipy.special.logsumexp(rest, axis=1)
    return log_p, log_other


def log_likelihood(logits, labels, multi_label: bool):
    """How sure each row's true labels are: minus its loss, `[N]`.

    The log-probability of the class, or the sum of the log-probabilities of the true
    value of every label.
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        return -np.logaddexp(0, np.where(labels > 0, -logits, logits)).sum(axis=1)
    return (scipy.special.log_softmax(logits, axis=1) * labels).sum(axis=1)


def true_probability(logits, labels, multi_label: bool) -> np.ndarray:
    """The probability of the truth, `[N]`; of labels the geometric mean of theirs.

    The product of many labels would be next to nothing beside the constant that RMIA
    adds to it.
    """
    surprise = log_likelihood(logits, labels, multi_label)
    return np.exp(surprise / labels.shape[1] if multi_label else surprise)

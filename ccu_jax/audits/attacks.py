"""What a model's outputs tell of whether it was trained on a row: signals and attacks.

A signal is one number for each row, higher where a model behaves as it does on rows it
knows. An attack compares those of unlearned rows with those of rows no model has seen.
"""

import numpy as np
import scipy.special

from ccu_jax.audit import confidence
from ccu_jax.audits.intervals import Interval, clopper_pearson, mean_interval


def signals(logits, labels, multi_label: bool) -> dict[str, np.ndarray]:
    """All signals `[N]` of logits `[N, K]` and labels `[N, K]`, by name.

    A model that says no numbers has none: NaN for all rows.
    """
    if not np.isfinite(logits).all():
        nothing = np.full(len(logits), np.nan)
        return dict.fromkeys(("loss", "margin", "entropy", "modified_entropy"), nothing)
    given = logits, labels, multi_label
    return {
        "loss": confidence(*given),
        "margin": margin(*given),
        "entropy": minus_entropy(logits, multi_label),
        "modified_entropy": minus_modified_entropy(*given),
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


def minus_entropy(logits, multi_label: bool) -> np.ndarray:
    """How decided a model is, whatever the truth, `[N]`.

    sum_j p_j log p_j (Shokri et al. 2017), or its sum over labels, each true or not.
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        yes, no = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
        return (np.exp(yes) * yes + np.exp(no) * no).sum(axis=1)
    log_p = scipy.special.log_softmax(logits, axis=1)
    return (np.exp(log_p) * log_p).sum(axis=1)


def minus_modified_entropy(logits, labels, multi_label: bool) -> np.ndarray:
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
    members, others, fpr: float, *, confidence: float = 0.95
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

    Returns:
        None where it cannot be measured at this sample size: there are fewer than
        1 / fpr others, or no members.
    """
    members, others = np.asarray(members), np.asarray(others)
    threshold = threshold_at_fpr(others, fpr)
    if threshold is None or not np.isfinite(members).all():
        return None
    return clopper_pearson(int((members > threshold).sum()), len(members), confidence)


def tpr_difference(
    members,
    others,
    reference_members,
    reference_others,
    fpr: float,
    *,
    confidence: float = 0.95,
) -> Interval | None:
    """A model's `tpr_at_fpr` minus a reference's on the same rows, paired.

    Each at its own threshold. None where one of both cannot be measured.
    """
    found = []
    for inside, outside in ((members, others), (reference_members, reference_others)):
        threshold = threshold_at_fpr(np.asarray(outside), fpr)
        if threshold is None or not np.isfinite(inside).all():
            return None
        found.append((np.asarray(inside) > threshold).astype(float))
    return mean_interval(found[0] - found[1], bounds=(-1, 1), confidence=confidence)


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


def leak(auc: Interval | None) -> str:
    """What an AUC alone tells, in words; on either side of a half it is a leak.

    Whether that is because of a model's memory, or unlearned and unseen rows are not
    alike, tells only a reference that never saw the rows: see `verdict`.
    """
    if auc is None:
        return "not measured"
    numbers = f"AUC {auc.value:.3f}, {auc.low:.3f} to {auc.high:.3f}"
    if auc.low > 0.5:
        return f"leaks: the model is surer of unlearned rows than of unseen ({numbers})"
    if auc.high < 0.5:
        return (
            "leaks by over-forgetting: the model is less sure of unlearned rows than "
            f"of unseen ({numbers})"
        )
    return f"no leak seen ({numbers})"


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

"""Scores of rankings, and differences of a model's scores from a reference's."""

from collections.abc import Callable, Mapping

import numpy as np

from ccu_jax.metrics.classification import auc, f1
from ccu_jax.metrics.intervals import (
    Groups,
    Interval,
    Values,
    difference_interval,
    mean_interval,
)

# What Tug-of-War is over, and its variant with the success of an attack.
TOW_SPLITS = ("unlearn", "retain", "test")
TOW_ATTACK = ("attack", "retain", "test")

SplitScores = Mapping[str, float | None]


def average_precision(values: Values, labels: Values) -> float | None:
    """Returns the average precision of a ranking by `values` `[N]`.

    Tied rows share a rank. None if no label `[N]` is positive.
    """
    order = np.argsort(-np.asarray(values), kind="stable")
    values, hits = np.asarray(values)[order], np.cumsum(np.asarray(labels)[order] > 0)
    if not len(hits) or not hits[-1]:
        return None
    last = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
    gained = np.diff(hits[last], prepend=0)
    return float((gained * hits[last] / (last + 1)).sum() / hits[-1])


def mean_average_precision(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the mean of `average_precision` over classes with a positive row."""
    return _mean_over_classes(average_precision, logits, labels)


def macro_auroc(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the mean AUROC over classes with positive and negative rows."""

    def class_auroc(values, labels):
        positive = labels > 0
        if not positive.any() or positive.all():
            return None
        return auc(values[positive], values[~positive])

    return _mean_over_classes(class_auroc, logits, labels)


def row_scores(logits: np.ndarray, labels: np.ndarray, multi_label: bool) -> np.ndarray:
    """Returns the score of each row, 0 to 1, `[N]`: top-1 accuracy, or samples F1."""
    logits, labels = np.asarray(logits), np.asarray(labels, np.float64)
    if multi_label:
        return f1(logits > 0, labels, axis=1)
    return labels[np.arange(len(logits)), logits.argmax(axis=1)]


def score_difference(
    logits: np.ndarray,
    reference: np.ndarray,
    labels: np.ndarray,
    multi_label: bool,
    *,
    confidence: float = 0.95,
    groups: Groups = None,
) -> Interval | None:
    """Returns the mean of `row_scores` minus that of a reference on the same rows.

    Args:
        logits: `[N, K]`.
        reference: `[N, K]`, logits of the reference.
        labels: `[N, K]`.
        multi_label: whether rows have several labels.
        confidence: of the interval.
        groups: `[N]` or None.

    Returns:
        None if there is no row or a logit is not finite.
    """
    if not (np.isfinite(logits).all() and np.isfinite(reference).all()):
        return None
    model, other = (row_scores(x, labels, multi_label) for x in (logits, reference))
    return mean_interval(
        model - other, bounds=(-1, 1), confidence=confidence, groups=groups
    )


def score_excess(
    logits: np.ndarray,
    reference: np.ndarray,
    labels: np.ndarray,
    is_unlearn: np.ndarray,
    multi_label: bool,
    *,
    confidence: float = 0.95,
    groups: Groups = None,
) -> Interval | None:
    """Returns `score_difference` on the unlearn set minus that on unseen rows.

    A model that is better than the reference on all images alike has an excess of 0;
    one that remembers the unlearn set has a positive one.

    Args as for `score_difference`, with the rows of both sets; `is_unlearn` `[N]` is
    True for the unlearn set.
    """
    unlearn, unseen = (
        score_difference(
            *(logits[rows], reference[rows], labels[rows], multi_label),
            confidence=confidence,
            groups=None if groups is None else groups[rows],
        )
        for rows in (is_unlearn, ~is_unlearn)
    )
    if unlearn is None or unseen is None:
        return None
    return difference_interval(unlearn, unseen)


def average_gap(model: SplitScores, reference: SplitScores) -> float | None:
    """Returns the mean absolute difference from the reference, in percentage points.

    Fan et al. (SalUn, 2024) average over the accuracies on the unlearn, retain and test
    set and the success of the attack, each 0 to 1. None if one is None.

    Raises:
        ValueError: the two have different keys.
    """
    gaps = _absolute_gaps(model, reference)
    return None if gaps is None else 100 * float(np.mean(gaps))


def tug_of_war(
    model: SplitScores,
    reference: SplitScores,
    names: tuple[str, ...] = TOW_SPLITS,
) -> float | None:
    """Returns ToW (Zhao et al. 2024): the product of 1 - |difference|, at best 1.

    Args:
        model: scores 0 to 1, as for `average_gap`.
        reference: the same of the retrained model.
        names: of the scores to use, `TOW_SPLITS` or `TOW_ATTACK`.
    """
    gaps = _absolute_gaps(*({k: x[k] for k in names} for x in (model, reference)))
    return None if gaps is None else float(np.prod([1 - gap for gap in gaps]))


def _mean_over_classes(score: Callable, logits, labels) -> float | None:
    logits, labels = np.asarray(logits), np.asarray(labels)
    if not len(logits) or not np.isfinite(logits).all():
        return None
    scores = [score(logits[:, k], labels[:, k]) for k in range(labels.shape[1])]
    scores = [x for x in scores if x is not None]
    return float(np.mean(scores)) if scores else None


def _absolute_gaps(model, reference) -> list[float] | None:
    if set(model) != set(reference) or not model:
        raise ValueError(
            "model and reference must have the same, non-empty score names; got "
            f"{sorted(model)} and {sorted(reference)}"
        )
    if None in (*model.values(), *reference.values()):
        return None
    return [abs(value - reference[name]) for name, value in model.items()]

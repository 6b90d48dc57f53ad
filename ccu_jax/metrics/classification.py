"""Scores of classifiers, and their differences from those of a reference model.

Logits and labels are `[N, K]`. Labels are one-hot, or multi-hot with `multi_label`.
"""

from collections.abc import Callable, Mapping

import numpy as np
import scipy.stats

from ccu_jax.metrics.intervals import Groups, Interval, mean_interval

# The scores that enter Tug-of-War, and those of its variant with attack success.
TOW_SPLITS = ("unlearn", "retain", "test")
TOW_ATTACK = ("attack", "retain", "test")

SplitScores = Mapping[str, float | None]


def single_label_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns accuracy, macro F1 and, with two classes that both occur, AUROC."""
    predicted = np.eye(labels.shape[1])[logits.argmax(axis=1)]
    scores = {
        "accuracy": float((predicted * labels).sum(axis=1).mean()),
        "macro_f1": float(f1(predicted, labels, axis=0).mean()),
    }
    if labels.shape[1] == 2:
        # In float32, rounding of the difference would cause ties.
        auroc = _auroc(logits[:, 1].astype(np.float64) - logits[:, 0], labels[:, 1])
        if auroc is not None:
            scores["auroc"] = auroc
    return scores


def multi_label_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns micro, macro, weighted and samples F1 at a probability threshold of 0.5.

    A class or row with neither true nor predicted labels scores 0, as in scikit-learn.
    """
    predicted = (logits > 0).astype(np.float64)
    per_class = f1(predicted, labels, axis=0)
    support = labels.sum(axis=0)
    return {
        "micro_f1": float(f1(predicted.ravel(), labels.ravel(), axis=0)),
        "macro_f1": float(per_class.mean()),
        "weighted_f1": float((per_class * support).sum() / max(support.sum(), 1)),
        "samples_f1": float(f1(predicted, labels, axis=1).mean()),
    }


def f1(predicted: np.ndarray, labels: np.ndarray, axis: int) -> np.ndarray:
    """Returns F1 along an axis of binary arrays; 0 where both are all zeros."""
    true_positives = (predicted * labels).sum(axis=axis)
    total = predicted.sum(axis=axis) + labels.sum(axis=axis)
    return 2 * true_positives / np.maximum(total, 1)


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Returns the probability that a positive scores above a negative; ties count 1/2.

    This is the area under the ROC curve (Mann & Whitney 1947).
    """
    count = len(positives)
    rank = scipy.stats.rankdata(np.concatenate([positives, negatives]))[:count].sum()
    return float((rank - count * (count + 1) / 2) / (count * len(negatives)))


def best_constant_score(labels: np.ndarray, multi_label: bool) -> float:
    """Returns the accuracy, or micro F1, of the best constant prediction."""
    frequency = np.sort(labels.mean(axis=0))[::-1]
    if not multi_label:
        return float(frequency[0])
    # The best prediction of n labels is the n most frequent ones.
    true_positives = np.cumsum(frequency)
    num_predicted = np.arange(1, len(frequency) + 1)
    return float((2 * true_positives / (num_predicted + frequency.sum())).max())


def mean_average_precision(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the average precision, averaged over classes with a positive row.

    Tied rows share a rank. None if there is no such class or a logit is not finite.
    """
    return _mean_over_classes(_average_precision, logits, labels)


def macro_auroc(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the AUROC, averaged over classes with positive and negative rows.

    None if there is no such class or a logit is not finite.
    """
    return _mean_over_classes(_auroc, logits, labels)


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
    """Returns the mean difference of `row_scores` from a reference, with its interval.

    `reference` are logits as well. None if there is no row or a logit is not finite.
    """
    if not (np.isfinite(logits).all() and np.isfinite(reference).all()):
        return None
    scores = (row_scores(x, labels, multi_label) for x in (logits, reference))
    return mean_interval(
        np.subtract(*scores), bounds=(-1, 1), confidence=confidence, groups=groups
    )


def average_gap(model: SplitScores, reference: SplitScores) -> float | None:
    """Returns the mean absolute difference from the reference, in percentage points.

    Fan et al. (SalUn, 2024) average over the accuracies on the unlearn, retain and test
    set and the success of the attack, each in [0, 1]. None if a score is None.

    Raises:
        ValueError: model and reference have different keys, or no keys.
    """
    gaps = _absolute_gaps(model, reference)
    return None if gaps is None else 100 * float(np.mean(gaps))


def tug_of_war(
    model: SplitScores, reference: SplitScores, names: tuple[str, ...] = TOW_SPLITS
) -> float | None:
    """Returns ToW (Zhao et al. 2024): the product of 1 - |difference|, at best 1.

    The scores are those of `average_gap`, restricted to `names`.
    """
    gaps = _absolute_gaps(*({k: x[k] for k in names} for x in (model, reference)))
    return None if gaps is None else float(np.prod([1 - gap for gap in gaps]))


def _average_precision(values: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the average precision of one class, or None without a positive row."""
    order = np.argsort(-values, kind="stable")
    values, hits = values[order], np.cumsum(labels[order] > 0)
    if not hits[-1]:
        return None
    last = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
    new_hits = np.diff(hits[last], prepend=0)
    return float((new_hits * hits[last] / (last + 1)).sum() / hits[-1])


def _auroc(values: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the AUROC of one class, or None unless both kinds of rows occur."""
    positive = labels > 0
    if not positive.any() or positive.all():
        return None
    return auc(values[positive], values[~positive])


def _mean_over_classes(score: Callable, logits, labels) -> float | None:
    """Returns the mean of `score` over the classes for which it is not None."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    if not len(logits) or not np.isfinite(logits).all():
        return None
    scores = [score(logits[:, k], labels[:, k]) for k in range(labels.shape[1])]
    scores = [x for x in scores if x is not None]
    return float(np.mean(scores)) if scores else None


def _absolute_gaps(model, reference) -> list[float] | None:
    """Returns |model - reference| of each score, or None if a score is None."""
    if set(model) != set(reference) or not model:
        raise ValueError(
            "model and reference must have the same, non-empty score names; got "
            f"{sorted(model)} and {sorted(reference)}"
        )
    if None in (*model.values(), *reference.values()):
        return None
    return [abs(value - reference[name]) for name, value in model.items()]

"""Accuracy, F1 and AUROC of logits."""

import numpy as np
import scipy.stats


def single_label_scores(logits, labels) -> dict[str, float]:
    """Accuracy, and the F1 score averaged over classes, of `[N, K]` logits.

    With two classes also "auroc", how well the second class is told from the first,
    where there are rows of both.
    """
    predicted = np.eye(labels.shape[1])[logits.argmax(axis=1)]
    found = {
        "accuracy": float((predicted * labels).sum(axis=1).mean()),
        "macro_f1": float(_f1(predicted, labels, axis=0).mean()),
    }
    if labels.shape[1] == 2:
        second = labels[:, 1] > 0
        if second.any() and not second.all():
            # In double precision: rows must not be tied by rounding.
            score = logits[:, 1].astype(np.float64) - logits[:, 0]
            found["auroc"] = auc(score[second], score[~second])
    return found


def multi_label_scores(logits, labels) -> dict[str, float]:
    """F1 scores of `[N, K]` logits at probability 0.5, averaged in the four usual ways.

    A class or row without true and predicted labels counts 0, as in scikit-learn.
    """
    predicted = (logits > 0).astype(np.float64)
    per_class = _f1(predicted, labels, axis=0)
    frequency = labels.sum(axis=0)
    return {
        "micro_f1": float(_f1(predicted.ravel(), labels.ravel(), axis=0)),
        "macro_f1": float(per_class.mean()),
        "weighted_f1": float((per_class * frequency).sum() / max(frequency.sum(), 1)),
        "samples_f1": float(_f1(predicted, labels, axis=1).mean()),
    }


def auc(positives, negatives) -> float:
    """Chance that a positive's value exceeds a negative's, ties counting half.

    The area under the ROC curve (Mann & Whitney 1947). 0.5 tells nothing, and below 0.5
    tells as much as above.
    """
    count = len(positives)
    rank = scipy.stats.rankdata(np.concatenate([positives, negatives]))[:count].sum()
    return float((rank - count * (count + 1) / 2) / (count * len(negatives)))


def _f1(predicted, labels, axis):
    both = (predicted * labels).sum(axis=axis)
    return 2 * both / np.maximum(predicted.sum(axis=axis) + labels.sum(axis=axis), 1)


def best_constant_score(labels, multi_label: bool) -> float:
    """Accuracy, or micro F1, of the best single answer to all rows of `[N, K]`."""
    common = np.sort(labels.mean(axis=0))[::-1]
    if not multi_label:
        return float(common[0])
    found = np.cumsum(common)
    size = np.arange(1, len(common) + 1)
    return float((2 * found / (size + common.sum())).max())

"""Accuracy, F1 and AUROC of logits."""

import numpy as np
import scipy.stats


def single_label_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns accuracy and macro F1, and "auroc" if there are two classes.

    Args:
        logits: `[N, K]`.
        labels: one-hot, `[N, K]`. Without rows of both classes there is no "auroc".
    """
    predicted = np.eye(labels.shape[1])[logits.argmax(axis=1)]
    scores = {
        "accuracy": float((predicted * labels).sum(axis=1).mean()),
        "macro_f1": float(f1(predicted, labels, axis=0).mean()),
    }
    if labels.shape[1] == 2:
        positive = labels[:, 1] > 0
        if positive.any() and not positive.all():
            # In float32, rounding of the difference would cause ties.
            score = logits[:, 1].astype(np.float64) - logits[:, 0]
            scores["auroc"] = auc(score[positive], score[~positive])
    return scores


def multi_label_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns micro, macro, weighted and samples F1 at probability 0.5.

    A class or row without true and predicted labels counts 0, as in scikit-learn.

    Args:
        logits: `[N, K]`.
        labels: 0 or 1, `[N, K]`.
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
    """Returns F1 along an axis of two arrays of 0 and 1; 0 if both are empty."""
    both = (predicted * labels).sum(axis=axis)
    return 2 * both / np.maximum(predicted.sum(axis=axis) + labels.sum(axis=axis), 1)


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Returns the probability that a positive exceeds a negative; ties count half.

    This is the area under the ROC curve (Mann & Whitney 1947).
    """
    count = len(positives)
    rank = scipy.stats.rankdata(np.concatenate([positives, negatives]))[:count].sum()
    return float((rank - count * (count + 1) / 2) / (count * len(negatives)))


def best_constant_score(labels: np.ndarray, multi_label: bool) -> float:
    """Returns the accuracy, or micro F1, of the best constant prediction.

    Args:
        labels: `[N, K]`.
        multi_label: whether rows have several labels; selects micro F1.
    """
    frequency = np.sort(labels.mean(axis=0))[::-1]
    if not multi_label:
        return float(frequency[0])
    # The best prediction of n labels is the n most frequent ones.
    true_positives = np.cumsum(frequency)
    num_predicted = np.arange(1, len(frequency) + 1)
    return float((2 * true_positives / (num_predicted + frequency.sum())).max())

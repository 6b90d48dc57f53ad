"""Scores that need a ranking, and how far a model's scores are from a reference's.

Accuracy and F1 of all rows together are in `ccu_jax.evaluate`.
"""

from collections.abc import Mapping

import numpy as np

from ccu_jax.metrics.classification import auc
from ccu_jax.metrics.intervals import Interval, difference_interval, mean_interval

# What the Tug-of-War is over: RUM's, and its form with an attack.
TOW_SPLITS, TOW_ATTACK = ("unlearn", "retain", "test"), ("attack", "retain", "test")


def average_precision(values, truth) -> float | None:
    """The mean precision at each true row of a ranking, of `[N]` and `[N]`.

    Rows of the same value come together. None where no row is true.
    """
    order = np.argsort(-np.asarray(values), kind="stable")
    values, found = np.asarray(values)[order], np.cumsum(np.asarray(truth)[order] > 0)
    if not len(found) or not found[-1]:
        return None
    last = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)
    gained = np.diff(found[last], prepend=0)
    return float((gained * found[last] / (last + 1)).sum() / found[-1])


def mean_average_precision(logits, labels) -> float | None:
    """mAP of logits `[N, K]`: the mean over the classes that have a true row."""
    return _over_classes(average_precision, logits, labels)


def macro_auroc(logits, labels) -> float | None:
    """The AUROC of logits `[N, K]`: its mean over classes with rows of both kinds."""

    def one(values, truth):
        true = truth > 0
        return auc(values[true], values[~true]) if 0 < true.sum() < len(true) else None

    return _over_classes(one, logits, labels)


def row_scores(logits, labels, multi_label: bool) -> np.ndarray:
    """How right each row is, 0 to 1, `[N]`: its class, or the F1 score of its labels.

    Their mean is the accuracy, or "samples F1".
    """
    logits, labels = np.asarray(logits), np.asarray(labels, np.float64)
    if not multi_label:
        return labels[np.arange(len(logits)), logits.argmax(axis=1)]
    predicted = logits > 0
    both = (predicted * labels).sum(axis=1)
    return 2 * both / np.maximum(predicted.sum(axis=1) + labels.sum(axis=1), 1)


def score_difference(
    logits,
    reference,
    labels,
    multi_label: bool,
    *,
    confidence: float = 0.95,
    groups=None,
) -> Interval | None:
    """The mean of `by_row` minus that of a reference on the same rows, paired.

    On the unlearn set it is what `verdict` asks for: how much worse than a model that
    never saw these rows does it do there?
    """
    if not (np.isfinite(logits).all() and np.isfinite(reference).all()):
        return None
    right = [row_scores(x, labels, multi_label) for x in (logits, reference)]
    return mean_interval(
        right[0] - right[1], bounds=(-1, 1), confidence=confidence, groups=groups
    )


def score_excess(
    logits, reference, labels, of_unlearn, multi_label: bool, *, groups=None, **how
) -> Interval | None:
    """`score_difference` of the unlearn set, less that of unseen rows.

    How much better a model does there than it does on any picture, each beside the
    reference: who is better at all alike remembers none.

    Args:
        logits: `[N, K]` of rows of both sets.
        reference: likewise.
        labels: likewise.
        of_unlearn: `[N]`, which are of the unlearn set.
        multi_label: whether rows have several labels.
        groups: `[N]`, of rows that go together.
        **how: as for `score_difference`.
    """
    found = []
    for rows in (of_unlearn, ~of_unlearn):
        given = logits[rows], reference[rows], labels[rows], multi_label
        of = None if groups is None else groups[rows]
        found.append(score_difference(*given, groups=of, **how))
    return None if None in found else difference_interval(*found)


def average_gap(model: Mapping, reference: Mapping) -> float | None:
    """The mean difference from the reference, without sign, in points.

    The tables of Fan et al. (SalUn, 2024) are over the accuracy on the unlearn, retain
    and test set and the attack's success: `{"unlearn": .., "retain": .., "test": ..,
    "attack": ..}`, each 0 to 1. None where one is.

    Raises:
        ValueError: where the two do not have the same keys.
    """
    gaps = _gaps(model, reference)
    return None if gaps is None else 100 * float(np.mean(list(gaps.values())))


def tug_of_war(model: Mapping, reference: Mapping, over=TOW_SPLITS) -> float | None:
    """ToW (Zhao et al. 2024): the product over sets of 1 - |difference|, at best 1.

    Args:
        model: values 0 to 1, as for `average_gap`.
        reference: the same of the retrained model.
        over: which of them; `TOW_ATTACK` gives the form in which the attack's success
            stands for the accuracy on the unlearn set.
    """
    gaps = _gaps({k: model[k] for k in over}, {k: reference[k] for k in over})
    return None if gaps is None else float(np.prod([1 - gap for gap in gaps.values()]))


def _over_classes(score, logits, labels):
    logits, labels = np.asarray(logits), np.asarray(labels)
    if not len(logits) or not np.isfinite(logits).all():
        return None
    found = [score(logits[:, k], labels[:, k]) for k in range(labels.shape[1])]
    found = [value for value in found if value is not None]
    return float(np.mean(found)) if found else None


def _gaps(model, reference) -> dict[str, float] | None:
    if set(model) != set(reference) or not model:
        raise ValueError(
            f"the same scores are needed of both, not {sorted(model)} and "
            f"{sorted(reference)}"
        )
    if None in (*model.values(), *reference.values()):
        return None
    return {name: abs(value - reference[name]) for name, value in model.items()}

"""Membership attacks: pure functions of stored outputs."""

import numpy as np
import scipy.special

from ccu_jax.evaluate.forward import (
    Results,
    auc,
    multi_label_scores,
    single_label_scores,
)
from ccu_jax.models import VIEWS


def confidence(logits, labels, multi_label: bool):
    """How sure each row's true labels are: minus its loss, `[N]`.

    The log-probability of the class, or the sum of the log-probabilities of the true
    value of every label.
    """
    logits = np.asarray(logits, np.float64)
    if multi_label:
        return -np.logaddexp(0, np.where(labels > 0, -logits, logits)).sum(axis=1)
    return (scipy.special.log_softmax(logits, axis=1) * labels).sum(axis=1)


def attack_auc(outputs: Results) -> dict[str, float | None]:
    """AUC of the loss-threshold attack (Yeom et al. 2018) by view, `unseen` as control.

    `pair` attacks the cosine between a row's picture and its text, `white` what the
    trunk's features tell (`evaluate.white_box`): it needs the weights, the others need
    only what the model says. Pictures were to be forgotten, so rows without one are no
    members; None where no row is left, or a value is not finite.
    """

    def value(view, rows):
        if view in ("pair", "white"):
            return getattr(outputs, view)[rows]
        logits, labels = outputs.logits[view][rows], outputs.labels[rows]
        if not np.isfinite(logits).all():
            return np.full(len(logits), np.nan)
        return confidence(logits, labels, outputs.multi_label)

    def attack(view):
        rows = outputs.shown(view) & outputs.has_image
        unlearn, unseen = (
            value(view, rows & (outputs.of == name)) for name in ("unlearn", "unseen")
        )
        told = len(unlearn) and len(unseen)
        if not told or not np.isfinite([*unlearn, *unseen]).all():
            return None
        return auc(unlearn, unseen)

    views = (*VIEWS, "pair", *(() if outputs.white is None else ("white",)))
    return {view: attack(view) for view in views}


# Above guessing by so little, a model tells nothing; an original by so much, something.
_GUESSES, _KNOWS = 1.05, 1.2


def collapse(outputs: Results, original: Results) -> str | None:
    """What is wrong with a model that has fallen apart, or None.

    It says no numbers, or its fused test score, accuracy or micro F1, is that of the
    best single answer to every row, although the original's was not.
    """
    rows = (outputs.of == "test") & outputs.shown("fused")
    logits, labels = outputs.logits["fused"][rows], outputs.labels[rows]
    if not all(np.isfinite(x).all() for x in outputs.logits.values()):
        return "what it says are no numbers"
    if not len(logits):
        return None
    name = "micro_f1" if outputs.multi_label else "accuracy"
    measure = multi_label_scores if outputs.multi_label else single_label_scores
    score = measure(logits, labels)[name]
    before = measure(original.logits["fused"][rows], labels)[name]
    guess = guessing(labels, outputs.multi_label)
    if score > _GUESSES * guess or before <= _KNOWS * guess:
        return None
    return f"collapsed: its fused test {name} is {score:.3f}, that of guessing"


def guessing(labels, multi_label: bool) -> float:
    """Accuracy, or micro F1, of the best single answer to all rows of `[N, K]`."""
    common = np.sort(labels.mean(axis=0))[::-1]
    if not multi_label:
        return float(common[0])
    found = np.cumsum(common)
    size = np.arange(1, len(common) + 1)
    return float((2 * found / (size + common.sum())).max())

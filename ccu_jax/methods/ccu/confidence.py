"""Confidence in the true labels, on an unbounded scale.

    g = -log(-sum_k log p_k)

where p_k is the probability of the true value of label k; for single labels the sum has
one term, the true class. Letters: N rows, K classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

_TINY = 1e-30


def log_likelihood(logits_NxK: Array, labels_NxK: Array, *, multi_label: bool) -> Array:
    """Returns sum_k log p_k, `[N]`."""
    if multi_label:
        signed = jnp.where(labels_NxK > 0, -logits_NxK, logits_NxK)
        return -jax.nn.softplus(signed).sum(axis=1)
    # log softmax would round to 0 for confident rows.
    true_N = jnp.sum(labels_NxK * logits_NxK, axis=1)
    others = jnp.where(labels_NxK > 0, -jnp.inf, logits_NxK)
    return -jax.nn.softplus(jax.nn.logsumexp(others, axis=1) - true_N)


def confidence(logits_NxK: Array, labels_NxK: Array, *, multi_label: bool) -> Array:
    """Returns the confidence g = -log(-sum_k log p_k) of each row, `[N]`."""
    total_N = log_likelihood(logits_NxK, labels_NxK, multi_label=multi_label)
    return -jnp.log(jnp.maximum(-total_N, _TINY))


def scores_to_logits(scores: Array) -> Array:
    """Converts multi-label ridge scores, near 0 to 1, to logits."""
    return jax.scipy.special.logit(jnp.clip(scores, 0.02, 0.98))


def margin(scores_NxK: Array, labels_NxK: Array, *, multi_label: bool) -> Array:
    """Returns how well ridge scores fit the labels, `[N]`.

    Single-label: the score of the true class minus the highest other score.
    Multi-label: the confidence, which mostly depends on the number of labels and on how
    common they are.
    """
    if multi_label:
        logits = scores_to_logits(scores_NxK)
        return confidence(logits, labels_NxK, multi_label=True)
    other_N = jnp.where(labels_NxK > 0, -jnp.inf, scores_NxK).max(axis=1)
    return (scores_NxK * labels_NxK).sum(axis=1) - other_N


def recall_at_k(scores_NxK: Array, labels_NxK: Array) -> Array:
    """Returns the fraction of each row's k true labels in its top-k scores, `[N]`."""
    place = jnp.argsort(jnp.argsort(-scores_NxK, axis=1), axis=1)
    num_labels = labels_NxK.sum(axis=1, keepdims=True)
    num_hits_N = ((place < num_labels) * labels_NxK).sum(axis=1)
    return num_hits_N / jnp.maximum(num_labels[:, 0], 1)


def with_confidence(
    base_NxK: Array, labels_NxK: Array, g_N: Array, *, multi_label: bool
) -> Array:
    """Returns probabilities `[N, K]` of confidence g, otherwise like the base logits.

    Single-label: the true class gets probability exp(-exp(-g)); the other classes share
    the rest in the proportions of the base logits.
    Multi-label: sigmoid(base + s * t), where t_k = 1 for true labels and -1 for others.
    The likelihood increases with s, which is found by bisection in [-30, 30].
    """
    total_N = -jnp.exp(-g_N)
    if not multi_label:
        p_true = jnp.exp(total_N)[:, None]
        others = jax.nn.softmax(jnp.where(labels_NxK > 0, -1e9, base_NxK))
        return p_true * labels_NxK + (1 - p_true) * others

    direction = 2 * labels_NxK - 1

    def is_too_low(shift_N):
        logits = base_NxK + shift_N[:, None] * direction
        return log_likelihood(logits, labels_NxK, multi_label=True) < total_N

    max_shift = jnp.full_like(total_N, 30.0)
    shift_N = bisect(is_too_low, -max_shift, max_shift)
    return jax.nn.sigmoid(base_NxK + shift_N[:, None] * direction)


def bisect(is_too_low: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Finds, by 30 bisections, where a predicate of x changes from true to false."""

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        too_low = is_too_low(middle)
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    # An unrolled loop would compile `is_too_low` thirty times.
    return jax.lax.fori_loop(0, 30, halve, (low, high))[0]

"""Statistics for the targets of `ccu_plus`.

The confidence in the true labels, on an unbounded scale, is

    g = -log(-sum_k log p_k)

where p_k is the probability of label k's true value; single-label: the true class only.

The other statistics are over the valid rows of padded tables: `valid` is false for
padding rows, which may contain any finite values.

Letters: N, M rows, K classes, F predictors.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

_TINY = 1e-30


def log_likelihood(logits_NxK: Array, labels_NxK: Array, multi_label: bool) -> Array:
    """Returns the log-likelihood sum_k log p_k of each row, `[N]`."""
    if multi_label:
        signed = jnp.where(labels_NxK > 0, -logits_NxK, logits_NxK)
        return -jax.nn.softplus(signed).sum(axis=1)
    # log softmax would round to 0 for confident rows.
    true_N = jnp.sum(labels_NxK * logits_NxK, axis=1)
    false_NxK = jnp.where(labels_NxK > 0, -jnp.inf, logits_NxK)
    return -jax.nn.softplus(jax.nn.logsumexp(false_NxK, axis=1) - true_N)


def confidence(logits_NxK: Array, labels_NxK: Array, multi_label: bool) -> Array:
    """Returns the confidence g, -log of the cross-entropy of each row, `[N]`."""
    total_N = log_likelihood(logits_NxK, labels_NxK, multi_label)
    return -jnp.log(jnp.maximum(-total_N, _TINY))


def scores_to_logits(scores: Array) -> Array:
    """Converts multi-label ridge scores, roughly in [0, 1], to logits."""
    return jax.scipy.special.logit(jnp.clip(scores, 0.02, 0.98))


def margin(scores_NxK: Array, labels_NxK: Array, multi_label: bool) -> Array:
    """Returns the margin of the ridge scores of the true labels, `[N]`.

    Single-label: the score of the true class minus the highest other score.
    Multi-label: the confidence, which mostly reflects the labels' count and frequency.
    """
    if multi_label:
        logits = scores_to_logits(scores_NxK)
        return confidence(logits, labels_NxK, multi_label=True)
    max_false_N = jnp.where(labels_NxK > 0, -jnp.inf, scores_NxK).max(axis=1)
    return (scores_NxK * labels_NxK).sum(axis=1) - max_false_N


def r_precision(scores_NxK: Array, labels_NxK: Array) -> Array:
    """Returns the fraction of each row's k true labels in its top-k scores, `[N]`."""
    place = jnp.argsort(jnp.argsort(-scores_NxK, axis=1), axis=1)
    num_labels = labels_NxK.sum(axis=1, keepdims=True)
    num_hits_N = ((place < num_labels) * labels_NxK).sum(axis=1)
    return num_hits_N / jnp.maximum(num_labels[:, 0], 1)


def probabilities_at_confidence(
    base_NxK: Array, labels_NxK: Array, g_N: Array, multi_label: bool
) -> Array:
    """Returns probabilities `[N, K]` with confidence g, derived from the base logits.

    Single-label: the true class gets probability exp(-exp(-g)); the other classes share
    the rest in the proportions of the base logits.
    Multi-label: sigmoid(base + s * t), where t_k = 1 for true labels and -1 for others.
    The likelihood increases with s, which is found by bisection in [-30, 30].
    """
    total_N = -jnp.exp(-g_N)
    if not multi_label:
        p_true = jnp.exp(total_N)[:, None]
        p_false = jax.nn.softmax(jnp.where(labels_NxK > 0, -1e9, base_NxK))
        return p_true * labels_NxK + (1 - p_true) * p_false

    direction = 2 * labels_NxK - 1

    def is_too_low(shift_N):
        logits = base_NxK + shift_N[:, None] * direction
        return log_likelihood(logits, labels_NxK, multi_label=True) < total_N

    max_shift = jnp.full_like(total_N, 30.0)
    shift_N = bisect(is_too_low, -max_shift, max_shift)
    return jax.nn.sigmoid(base_NxK + shift_N[:, None] * direction)


def bisect(is_too_low: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Finds by 30 bisections where `is_too_low` changes from true to false."""

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        too_low = is_too_low(middle)
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    # An unrolled loop would compile `is_too_low` thirty times.
    return jax.lax.fori_loop(0, 30, halve, (low, high))[0]


def mean(x_N: Array, valid_N: Array) -> Array:
    """Returns the mean; 0 if no row is valid."""
    total = jnp.where(valid_N, x_N, 0.0).sum()
    return total / jnp.maximum(valid_N.sum(), 1)


def std(x_N: Array, valid_N: Array) -> Array:
    """Returns the standard deviation; 0 if no row is valid."""
    center = mean(x_N, valid_N)
    return jnp.sqrt(mean((x_N - center) ** 2, valid_N))


def sort_valid(x_N: Array, valid_N: Array) -> Array:
    """Sorts the valid values in ascending order; padding rows become trailing inf."""
    return jnp.sort(jnp.where(valid_N, x_N, jnp.inf))


def quantile(q: Array, x_N: Array, valid_N: Array) -> Array:
    """Returns quantiles q of the valid values, interpolated as in `numpy.quantile`."""
    sorted_N = sort_valid(x_N, valid_N)
    last = jnp.maximum(valid_N.sum() - 1, 0)
    position = q * last
    low = jnp.floor(position).astype(jnp.int32)
    a, b = sorted_N[low], sorted_N[jnp.minimum(low + 1, last)]
    return a + (position - low) * (b - a)


def ecdf(x_M: Array, sample_N: Array, valid_N: Array) -> Array:
    """Returns the fraction of the sample below each x, strictly in (0, 1).

    Ties count half. With n valid rows, the fraction is (count + 1/2) / (n + 1).
    """
    sorted_N = sort_valid(sample_N, valid_N)
    num_below = jnp.searchsorted(sorted_N, x_M, side="left")
    num_up_to = jnp.searchsorted(sorted_N, x_M, side="right")
    return ((num_below + num_up_to) / 2 + 0.5) / (valid_N.sum() + 1)


def rank(x_N: Array, valid_N: Array) -> Array:
    """Returns ranks among the valid rows, evenly spaced in (0, 1); 0.5 for padding."""
    place = jnp.argsort(jnp.argsort(jnp.where(valid_N, x_N, jnp.inf)))
    place = (place + 0.5) / jnp.maximum(valid_N.sum(), 1)
    return jnp.where(valid_N, place, 0.5)


def fit_line(x_NxF: Array, y_N: Array, valid_N: Array) -> Callable[[Array], Array]:
    """Fits a linear regression; returns the predictor `x_NxF -> y_N`."""
    mask = valid_N[:, None].astype(x_NxF.dtype)
    x = jnp.concatenate([x_NxF, jnp.ones((len(x_NxF), 1))], axis=1) * mask
    gram = x.T @ x + 1e-3 * jnp.eye(x.shape[1])
    line = jnp.linalg.solve(gram, x.T @ jnp.where(valid_N, y_N, 0.0))
    return lambda x_NxF: x_NxF @ line[:-1] + line[-1]


def uniform_per_row(key: Array, num_rows: int) -> Array:
    """Draws a uniform number per row, which does not depend on `num_rows`."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows))
    return jax.vmap(jax.random.uniform)(keys)

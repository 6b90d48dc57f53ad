"""Ridge regression of labels on trunk features, in closed form."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from ccu_jax.metrics.membership import log_likelihood


def fit_ridge(
    features_RxF: jax.Array, labels_RxK: jax.Array, weight_R: jax.Array, strength: float
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Fits a ridge regression and computes its leave-one-out predictions.

    The leave-one-out residual of a row is its residual divided by one minus its
    leverage (Cook & Weisberg 1982). Rows whose weight is False are padding. The penalty
    `strength` is relative to the mean eigenvalue of the feature covariance.

    Returns:
        A function that maps features `[N, F]` to scores `[N, K]`, roughly in [0, 1],
        and the leave-one-out scores `[R, K]` of the fitted rows.
    """
    counts = weight_R[:, None].astype(features_RxF.dtype)
    count = jnp.maximum(counts.sum(), 1)
    mean_F = (features_RxF * counts).sum(0) / count
    prior_K = (labels_RxK * counts).sum(0) / count
    x_RxF = (features_RxF - mean_F) * counts
    gram_FxF = x_RxF.T @ x_RxF
    size = gram_FxF.shape[0]
    gram_FxF += strength * jnp.trace(gram_FxF) / size * jnp.eye(size)
    right_sides = jnp.concatenate([x_RxF.T @ (labels_RxK - prior_K), x_RxF.T], axis=1)
    solutions = jax.scipy.linalg.solve(gram_FxF, right_sides, assume_a="pos")
    coefficients_FxK, inverse_FxR = jnp.split(solutions, [labels_RxK.shape[1]], axis=1)

    def predict(features_NxF):
        return (features_NxF - mean_F) @ coefficients_FxK + prior_K

    leverage = jnp.sum(x_RxF * inverse_FxR.T, axis=1, keepdims=True) + 1 / count
    residual_RxK = (labels_RxK - predict(features_RxF)) / (1 - leverage)
    return predict, labels_RxK - residual_RxK


def probe_margin(
    features: np.ndarray,
    labels: np.ndarray,
    is_fitted: np.ndarray,
    multi_label: bool,
    strength: float = 1.0,
) -> np.ndarray:
    """Returns each row's margin under a linear probe of the trunk's features.

    The probe is a ridge regression on rows of the retain set. Training the trunk on an
    image moves its features towards its labels, so a member has a higher margin even if
    the heads have unlearned it. Unlike `fit_ridge`, this uses double precision. The
    penalty `strength` is relative to the mean variance of the features `[N, F]`;
    `is_fitted` `[N]` selects the rows that the probe is fitted to.

    Returns:
        `[N]`. Single-label: the score of the true class minus the highest other score.
        Multi-label: the log-likelihood of the labels. NaN if a feature is not finite or
        no row is fitted.
    """
    x, y = np.asarray(features, np.float64), np.asarray(labels, np.float64)
    if not is_fitted.any() or not np.isfinite(x).all():
        return np.full(len(x), np.nan)
    x, prior = x - x[is_fitted].mean(0), y[is_fitted].mean(0)
    gram = x[is_fitted].T @ x[is_fitted]
    gram += max(strength * np.trace(gram) / len(gram), 1e-12) * np.eye(len(gram))
    target = x[is_fitted].T @ (y[is_fitted] - prior)
    scores = x @ np.linalg.solve(gram, target) + prior
    if multi_label:
        logits = scipy.special.logit(np.clip(scores, 0.02, 0.98))
        return log_likelihood(logits, y, multi_label)
    highest_wrong = np.where(y > 0, -np.inf, scores).max(axis=1)
    return (scores * y).sum(axis=1) - highest_wrong

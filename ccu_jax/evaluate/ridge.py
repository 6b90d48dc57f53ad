"""Ridge regression on trunk features: closed form, leave-one-out, linear probe."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special


def probe_margin(features, labels, known, multi_label: bool, strength: float = 1.0):
    """What features tell of each row's labels to somebody who has the weights, `[N]`.

    A ridge regression is fitted on the rows `known` (of the retain set); what is told
    is its margin, or with several labels its confidence. A trunk that has learned a
    picture puts it where its labels are: the attack of this value sees what heads that
    were unlearned no longer say.

    Args:
        features: `[N, F]`.
        labels: `[N, K]`.
        known: `[N]`, which rows the ridge is fitted on.
        multi_label: whether rows have several labels.
        strength: of the ridge, relative to the features' mean variance.
    """
    x, y = np.asarray(features, np.float64), np.asarray(labels, np.float64)
    if not known.any() or not np.isfinite(x).all():
        return np.full(len(x), np.nan)
    x, prior = x - x[known].mean(0), y[known].mean(0)
    gram = x[known].T @ x[known]
    gram += max(strength * np.trace(gram) / len(gram), 1e-12) * np.eye(len(gram))
    told = x @ np.linalg.solve(gram, x[known].T @ (y[known] - prior)) + prior
    if multi_label:
        told = scipy.special.logit(np.clip(told, 0.02, 0.98))
        return -np.logaddexp(0, np.where(y > 0, -told, told)).sum(axis=1)
    other = np.where(y > 0, -np.inf, told).max(axis=1)
    return (told * y).sum(axis=1) - other


def ridge(features_RxF, labels_RxK, weight_R, strength):
    """Retain-only predictor, and what it would say of its own rows without them.

    `strength` is relative to the mean eigenvalue of the features' covariance.

    Returns:
        `predict(features [N, F]) -> scores [N, K]` near 0..1, and the scores `[R, K]`
        of each retained row by the ridge fitted on all the others: leaving a row out
        divides its error by one minus its leverage (Cook & Weisberg 1982).
    """
    counts = weight_R[:, None].astype(features_RxF.dtype)
    count = jnp.maximum(counts.sum(), 1)
    mean_F = (features_RxF * counts).sum(0) / count
    prior_K = (labels_RxK * counts).sum(0) / count
    a = (features_RxF - mean_F) * counts
    gram = a.T @ a
    size = gram.shape[0]
    gram += strength * jnp.trace(gram) / size * jnp.eye(size)
    both = jnp.concatenate([a.T @ (labels_RxK - prior_K), a.T], axis=1)
    solved = jax.scipy.linalg.solve(gram, both, assume_a="pos")
    fitted, inverse = jnp.split(solved, [labels_RxK.shape[1]], axis=1)

    def predict(x):
        return (x - mean_F) @ fitted + prior_K

    leverage = jnp.sum(a * inverse.T, axis=1, keepdims=True) + 1 / count
    left_out = labels_RxK - (labels_RxK - predict(features_RxF)) / (1 - leverage)
    return predict, left_out

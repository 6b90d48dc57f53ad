"""Targets of `ccu_plus`: predictions expected of a model that never saw the images.

Such a model classifies an unlearn image by its similarity to retain images. For each
unlearn row u, `fit_prior` estimates once, from features and the original's logits:

* base logits b_u, predicted by a ridge regression from trunk features to labels that is
  fitted to retain rows;
* a rank rho_u in (0, 1): how well the true labels fit the image, compared with held-out
  images, which the original never saw either.

`update_targets` runs at each refresh with the current model. With Q_V the quantiles
and F_V the empirical CDF of the held-out rows' confidences g (`statistics.py`), the
target confidence in the image view is

    t_u = Q_V(rho_u) - bias,
    bias <- bias + gain * std(g_V) * mean_u(F_V(g_u) - F_V(Q_V(rho_u)))

The bias closes the loop: a model that is fitted to targets ends up slightly above them.
For the fused view, the quantile is replaced by the confidence of a similar held-out
row. Target probabilities are those of b_u with the true labels' logits moved until the
confidence is t_u (`probabilities_at_confidence`).

Letters: U unlearn rows, V held-out rows, R retain rows, K classes. Tables are padded:
`valid` is false for padding rows, which may contain any finite values.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ccu_jax.evaluate.ridge import fit_ridge
from ccu_jax.methods.ccu import statistics as stats
from ccu_jax.methods.problem import Rows
from ccu_jax.models import VIEWS

# Features of an untrained trunk are less informative and need less regularization.
UNTRAINED_RIDGE = 0.3
# Maximum bias, in standard deviations of the held-out confidences.
MAX_BIAS = 3.0


class Prior(NamedTuple):
    """Estimated outputs for the unlearn rows, from which targets are computed."""

    base: Array  # logits b_u [U, K]
    text: Array  # logits that the texts add in the fused view [U, K]
    is_retained: Array  # whether the retain set contains the class [K]
    image_rank: Array  # rho_u [U]
    fused_rank: Array  # random ranks, evenly spaced in (0, 1) [U]
    # Whether unlearn and held-out rows differ in distribution, as for a whole class;
    # targets then ignore true labels and confidences.
    is_shifted: Array


class Targets(NamedTuple):
    """The targets of the views `image` and `fused`."""

    probability: dict[str, Array]  # [U, K] by view
    confidence: dict[str, Array]  # [U] by view
    bias: dict[str, Array]  # scalars by view


def fit_prior(
    u: Rows, v: Rows, r: Rows, key: Array, *, strength: float, multi_label: bool
) -> Prior:
    """Estimates base logits and ranks of the unlearn rows.

    Args:
        u, v, r: unlearn, held-out and retain rows with pooled trunk features `pooled`,
            those of an untrained trunk `fresh`, `labels`, the original's logits
            `image`, `text` and `fused`, and `valid`.
        key: random key for residuals and for the fused ranks.
        strength: ridge strength, relative to the mean eigenvalue.
    """
    predict, scores_r = fit_ridge(r["pooled"], r["labels"], r["valid"], strength)
    scores_u, scores_v = predict(u["pooled"]), predict(v["pooled"])
    keys = jax.random.split(key)
    counts_K = (r["labels"] * r["valid"][:, None]).sum(0)
    if multi_label:
        frequency_K = counts_K / jnp.maximum(r["valid"].sum(), 1)
        base = stats.scores_to_logits(scores_u)
        text = u["text"] - stats.scores_to_logits(frequency_K)
    else:
        max_p = stats.mean(jax.nn.softmax(v["image"]).max(1), v["valid"])
        base = _fit_temperature(scores_v, v["valid"], max_p) * scores_u
        text = jax.nn.log_softmax(u["text"])
    return Prior(
        base=base,
        text=text,
        is_retained=counts_K > 0,
        image_rank=_rank_images(u, v, r, scores_u, scores_v, keys[0], multi_label),
        fused_rank=stats.rank(
            stats.uniform_per_row(keys[1], len(scores_u)), u["valid"]
        ),
        is_shifted=_is_shifted(u, r, scores_u, scores_r),
    )


def _fit_temperature(scores, valid, max_p):
    """Returns the factor at which the mean of max softmax(factor * scores) is max_p."""

    def is_too_low(factor):
        return stats.mean(jax.nn.softmax(factor * scores).max(1), valid) < max_p

    return stats.bisect(is_too_low, jnp.zeros(()), jnp.full((), 100.0))


def _rank_images(u, v, r, scores_u, scores_v, key, multi_label):
    """Returns rho_u, the rank of each unlearn image among held-out images.

    The original's trunk has memorized the unlearn images, so its features would rank
    all of them high. The set of ranks therefore comes from an untrained trunk, and the
    original's features, which are better, determine the order of the rows.
    """

    def margin(scores, rows):
        return stats.margin(scores, rows["labels"], multi_label)

    predict, _ = fit_ridge(r["fresh"], r["labels"], r["valid"], UNTRAINED_RIDGE)
    margin_u, margin_v = margin(predict(u["fresh"]), u), margin(predict(v["fresh"]), v)
    ranks = stats.ecdf(margin_u, margin_v, v["valid"])
    predicted = _predict_with_residual(
        margin(scores_v, v)[:, None],
        stats.confidence(v["image"], v["labels"], multi_label),
        v["valid"],
        margin(scores_u, u)[:, None],
        key,
    )
    order = jnp.argsort(jnp.argsort(jnp.where(u["valid"], predicted, jnp.inf)))
    return jnp.where(u["valid"], stats.sort_valid(ranks, u["valid"])[order], 0.5)


def _predict_with_residual(x_v, y_v, valid_v, x_u, key):
    """Predicts y from x by a line fitted on v, plus residuals of random rows of v."""
    predict = stats.fit_line(x_v, y_v, valid_v)
    residuals = stats.sort_valid(y_v - predict(x_v), valid_v)
    index_U = stats.uniform_per_row(key, len(x_u)) * valid_v.sum()
    return predict(x_u) + residuals[index_U.astype(jnp.int32)]


def _is_shifted(u, r, scores_u, scores_r):
    """Returns whether label recall is much lower on unlearn rows than on retain rows.

    The difference must exceed both 4 standard errors and 0.1.
    """
    recall_U = stats.r_precision(scores_u, u["labels"])
    recall_R = stats.r_precision(scores_r, r["labels"])
    samples = ((recall_U, u["valid"]), (recall_R, r["valid"]))
    error = jnp.sqrt(
        sum(
            stats.std(x, valid) ** 2 / jnp.maximum(valid.sum(), 1)
            for x, valid in samples
        )
    )
    difference = stats.mean(*samples[1]) - stats.mean(*samples[0])
    return difference > jnp.maximum(4 * error, 0.1)


def update_targets(
    prior: Prior,
    u: Rows,
    v: Rows,
    bias: dict[str, Array],
    *,
    gain: Any,
    multi_label: bool,
) -> Targets:
    """Computes the targets from the predictions of the current model.

    Args:
        prior: from `fit_prior`.
        u, v: unlearn and held-out rows with `labels`, the original's logits `text`, the
            current model's logits `image` and `fused`, and `valid`.
        bias: bias of the previous targets; initially zeros.
        gain: step size of the bias.
    """
    g_u, g_v = (
        {view: stats.confidence(x[view], x["labels"], multi_label) for view in VIEWS}
        for x in (u, v)
    )
    image_u = stats.quantile(prior.image_rank, g_v["image"], v["valid"])
    fused_u = _expected_fused(prior, image_u, g_u, g_v, v["valid"])
    new_bias, target = {}, {}
    for view, expected_U in (("image", image_u), ("fused", fused_u)):
        heldout = g_v[view], v["valid"]
        rank_error = stats.ecdf(g_u[view], *heldout) - stats.ecdf(expected_U, *heldout)
        excess = stats.mean(rank_error, u["valid"])
        max_bias = MAX_BIAS * stats.std(*heldout)
        # Clipped, because the model may be unable to reach the targets.
        new_bias[view] = jnp.clip(
            bias[view] + gain * stats.std(*heldout) * excess, -max_bias, max_bias
        )
        target[view] = expected_U - new_bias[view]
    probability = _target_probabilities(prior, u["labels"], target, multi_label)
    return Targets(probability, target, new_bias)


def _expected_fused(prior, image_u, g_u, g_v, valid_v):
    """Returns the confidence `[U]` in the fused view expected without memorization.

    A line fitted on held-out rows predicts it from the confidences in the image view
    and the text view. For unlearn rows, these are the target in the image view and the
    current confidence in the text view, which does not have to be unlearned. Each row
    then gets the confidence of a held-out row with a similar prediction.
    """
    x_u = jnp.stack([image_u, g_u["text"]], axis=1)
    x_v = jnp.stack([g_v["image"], g_v["text"]], axis=1)
    predict = stats.fit_line(x_v, g_v["fused"], valid_v)
    return sample_nearest_value(
        predict(x_u), predict(x_v), g_v["fused"], valid_v, prior.fused_rank
    )


def sample_nearest_value(
    x_u: Array, x_v: Array, y_v: Array, valid_v: Array, choice_U: Array
) -> Array:
    """Returns, for each row of u, the y of a row of v with a similar x.

    `choice_U` in (0, 1) selects one of the tenth of the valid rows of v that is nearest
    in the order of x. Spread and skew of y may vary with x; nothing is extrapolated.
    """
    x_v = jnp.where(valid_v, x_v, jnp.inf)
    order, count = jnp.argsort(x_v), valid_v.sum()
    offset = (choice_U - 0.5) * jnp.maximum(count // 10, 1)
    position = jnp.searchsorted(x_v[order], x_u) + jnp.round(offset).astype(jnp.int32)
    return y_v[order][jnp.clip(position, 0, jnp.maximum(count - 1, 0))]


def _target_probabilities(prior, labels_UxK, target, multi_label):
    """Converts each view's target confidences to probabilities, `{view: [U, K]}`."""
    base, is_retained = prior.base, prior.is_retained
    # An image does not reveal a class outside the retain set; its text may.
    low = jnp.where(is_retained, base, -10.0 if multi_label else -1e9)
    num_retained = jnp.maximum(is_retained.sum(), 1)
    mean_logit = jnp.sum(base * is_retained, axis=1, keepdims=True) / num_retained
    fused = jnp.where(is_retained, base, mean_logit) + prior.text
    normalize = jax.nn.sigmoid if multi_label else jax.nn.softmax
    return {
        view: jnp.where(
            prior.is_shifted,
            normalize(unlabeled),
            stats.probabilities_at_confidence(
                logits, labels_UxK, target[view], multi_label
            ),
        )
        for view, unlabeled, logits in (("image", low, base), ("fused", fused, fused))
    }

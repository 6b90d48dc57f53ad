"""Objectives of CCU and of the baselines; each returns the same scalar on every device.

The losses of CCU (Xu et al. 2025, arXiv 2509.23895) are not public: the sections marked
CCU are a reconstruction from the text of the paper and the works cited below.

Letters: B rows on this device, G rows on all devices, K classes, D features; the suffix
u or r stands for rows of the unlearn set or the retain set. Rows have a weight `[B]`;
rows of weight 0 are ignored. Scalars are means over the rows of *all* devices, so that
gradients are correct under every executor. Functions are per-device.
"""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ccu_jax.distributed.executors import AXIS

# Stands for log 0: far below any logit, but finite, because -inf has NaN gradients.
LOG_ZERO = -1e9
# Scales the mean over K sigmoid losses to the size of a softmax loss.
MULTI_LABEL_SCALE = 4.0

Scalar = Array | float


class LabeledFeatures(NamedTuple):
    """Unit-norm features `[B, D]` with labels `[B, K]` and row weights `[B]`."""

    h: Array
    labels: Array
    weight: Array


def all_gather(x: Array) -> Array:
    """Gathers the rows `[B, ...]` of each device to `[G, ...]`, in device order."""
    return jax.lax.all_gather(x, AXIS, tiled=True)


def global_rows(num_rows: int) -> Array:
    """Returns the indices `[B]` of this device's rows in the output of `all_gather`."""
    return jax.lax.axis_index(AXIS) * num_rows + jnp.arange(num_rows)


def mean(value_B: Array, weight_B: Array) -> Array:
    """Returns the weighted mean over rows of all devices; 0 if all weights are 0."""
    chex.assert_rank([value_B, weight_B], 1)
    chex.assert_equal_shape([value_B, weight_B])
    weight_B = weight_B.astype(value_B.dtype)
    # 0 * inf is NaN, so values without weight are replaced.
    total = jnp.sum(jnp.where(weight_B > 0, value_B, 0.0) * weight_B)
    total, count = jax.lax.psum((total, jnp.sum(weight_B)), AXIS)
    return total / jnp.maximum(count, 1e-9)


def label_similarity(labels_AxK: Array, labels_BxK: Array) -> Array:
    """Returns the Jaccard similarity `[A, B]` of label sets; 0 or 1 for single labels.

    |a & b| / |a | b|
    """
    chex.assert_rank([labels_AxK, labels_BxK], 2)
    shared = labels_AxK @ labels_BxK.T
    union = labels_AxK.sum(1)[:, None] + labels_BxK.sum(1)[None, :] - shared
    return shared / jnp.maximum(union, 1.0)


def safe_log(weight: Array) -> Array:
    """Returns the logarithm of nonnegative weights; `LOG_ZERO` for weight 0."""
    return jnp.where(weight > 0, jnp.log(jnp.maximum(weight, 1e-9)), LOG_ZERO)


# --- classification and features ------------------------------------------------------


def cross_entropy_rows(
    logits_BxK: Array, target_BxK: Array, *, multi_label: bool
) -> Array:
    """Returns each row's cross-entropy `[B]` with hard or soft target probabilities.

    Single-label: softmax cross-entropy. Multi-label: `MULTI_LABEL_SCALE` times the mean
    of K binary cross-entropies.
    """
    chex.assert_equal_shape([logits_BxK, target_BxK])
    if multi_label:
        loss_BxK = jax.nn.softplus(logits_BxK) - target_BxK * logits_BxK
        return MULTI_LABEL_SCALE * loss_BxK.mean(axis=-1)
    return -jnp.sum(target_BxK * jax.nn.log_softmax(logits_BxK), axis=-1)


def cross_entropy(
    logits_BxK: Array,
    target_BxK: Array,
    weight_B: Array,
    *,
    multi_label: bool,
) -> Array:
    """Returns the weighted mean of `cross_entropy_rows`."""
    loss_B = cross_entropy_rows(logits_BxK, target_BxK, multi_label=multi_label)
    return mean(loss_B, weight_B)


def kl_divergence(
    teacher_BxK: Array,
    student_BxK: Array,
    weight_B: Array,
    *,
    multi_label: bool,
    temperature: Scalar = 1.0,
) -> Array:
    """Returns the mean distillation loss, a KL divergence (Hinton et al. 2015).

        T^2 KL(softmax(teacher / T) || softmax(student / T))

    Multi-label: with sigmoids. T^2 makes the gradient's size independent of T.
    """
    chex.assert_equal_shape([teacher_BxK, student_BxK])
    t, s = teacher_BxK / temperature, student_BxK / temperature
    target = jax.nn.sigmoid(t) if multi_label else jax.nn.softmax(t)
    kl_B = cross_entropy_rows(s, target, multi_label=multi_label)
    kl_B = kl_B - cross_entropy_rows(t, target, multi_label=multi_label)
    return temperature**2 * mean(kl_B, weight_B)


def info_nce(
    z_a_BxD: Array, z_b_BxD: Array, weight_B: Array, *, temperature: Scalar
) -> Array:
    """Returns the symmetric InfoNCE loss of unit features (Radford et al. 2021).

        -log exp(a_i . b_i / temperature) / sum_j exp(a_i . b_j / temperature)

    averaged with the same term with a and b exchanged.
    """
    chex.assert_equal_shape([z_a_BxD, z_b_BxD])
    own_B = global_rows(z_a_BxD.shape[0])
    mask_G = jnp.where(all_gather(weight_B) > 0, 0.0, LOG_ZERO)
    total = jnp.zeros(())
    for a, b in ((z_a_BxD, z_b_BxD), (z_b_BxD, z_a_BxD)):
        logits_BxG = a @ all_gather(b).T / temperature + mask_G
        own_logit_B = jnp.take_along_axis(logits_BxG, own_B[:, None], axis=1)[:, 0]
        total += mean(jax.nn.logsumexp(logits_BxG, axis=1) - own_logit_B, weight_B)
    return total / 2


def squared_distance(a_BxD: Array, b_BxD: Array, weight_B: Array) -> Array:
    """Returns the mean squared distance between features (Cheng & Amiri 2024)."""
    chex.assert_equal_shape([a_BxD, b_BxD])
    return mean(jnp.mean((a_BxD - b_BxD) ** 2, axis=1), weight_B)


# --- CCU: (a) selective visual unlearning ---------------------------------------------


def inverse_contrast(
    u: LabeledFeatures,
    r: LabeledFeatures,
    *,
    temperature: Scalar,
    pull: Scalar = 0.0,
    gate_u: Scalar = 1.0,
    stop_retain_gradient: bool = True,
) -> Array:
    """Returns a loss that pushes unlearn images away from retain images of their class.

    For an unlearn row with feature h_u, and P(u) the retain rows that share labels with
    it (w_up: Jaccard similarity):

        log sum_{p in P(u)} w_up exp(h_u . sg(h_p) / temperature)
        - pull * mean_{a not in P(u)} h_u . sg(h_a) / temperature

    SupCon (Khosla et al. 2020) with positives and negatives exchanged, as in
    Contrastive Unlearning (Lee et al. 2024). The stop-gradient sg blocks
    gradients of the retain features. If P(u) is empty, a row has only the second term.

    Args:
        u, r: unlearn and retain rows.
        temperature: divides the similarities.
        pull: weight of the second term.
        gate_u: `[B]`, multiplies each row's loss but not the count of the mean.
        stop_retain_gradient: whether to use sg.
    """
    chex.assert_rank([u.h, r.h, u.labels, r.labels], 2)
    r_G = jax.tree.map(all_gather, r)
    h_G = jax.lax.stop_gradient(r_G.h) if stop_retain_gradient else r_G.h
    exists_G = r_G.weight > 0
    share_BxG = label_similarity(u.labels, r_G.labels) * exists_G
    logits_BxG = u.h @ h_G.T / temperature
    has_positive_B = share_BxG.sum(1) > 0
    push_B = jax.nn.logsumexp(logits_BxG + safe_log(share_BxG), axis=1)
    push_B = jnp.where(has_positive_B, push_B, 0.0)
    other_BxG = (share_BxG == 0) & exists_G
    num_other_B = other_BxG.sum(1)
    pull_B = jnp.sum(logits_BxG * other_BxG, axis=1) / jnp.maximum(num_other_B, 1)
    has_term_B = has_positive_B | ((pull > 0) & (num_other_B > 0))
    return mean((push_B - pull * pull_B) * gate_u, u.weight * has_term_B)


def pair_dissociation(
    z_image_u: Array,
    text_u: LabeledFeatures,
    text_r: LabeledFeatures,
    *,
    offset: Scalar = 0.0,
    two_sided: bool = False,
) -> Array:
    """Returns a loss that lowers the cosine similarity of unlearn images and texts.

        (z_u . sg(t_u) - s_u)^2,  s_u = sg(mean_{p in P(u)} z_u . t_p) + offset

    for image embeddings z and text embeddings t; P(u) are the retain rows that share
    labels with u, weighted by Jaccard similarity. Unless `two_sided`, only similarities
    above s_u have a loss. `offset` is estimated on held-out images, see `ccu_plus`.

    Args:
        z_image_u: unit embeddings `[B, D]` of unlearn images.
        text_u, text_r: text embeddings of unlearn and retain rows.
        offset: raises the target similarity s_u.
        two_sided: whether to raise similarities below s_u.
    """
    chex.assert_equal_shape([z_image_u, text_u.h])
    r_G = jax.tree.map(all_gather, text_r)
    z_G = jax.lax.stop_gradient(r_G.h)
    share_BxG = label_similarity(text_u.labels, r_G.labels) * (r_G.weight > 0)
    count_B = share_BxG.sum(1)
    class_sum_B = jnp.sum(z_image_u @ z_G.T * share_BxG, axis=1)
    class_mean_B = class_sum_B / jnp.maximum(count_B, 1e-9)
    own_B = jnp.sum(z_image_u * jax.lax.stop_gradient(text_u.h), axis=1)
    excess_B = own_B - jax.lax.stop_gradient(class_mean_B) - offset
    if not two_sided:
        excess_B = jnp.maximum(excess_B, 0.0)
    return mean(excess_B**2, text_u.weight * (count_B > 0))


def confidence_loss(value_B: Array, target_B: Array, weight_B: Array) -> Array:
    """Returns the mean Huber loss of confidences (Huber 1964).

        d^2 / 2 if |d| <= 1, else |d| - 1/2,  d = value - sg(target)

    Unlike a cross-entropy near 0, it distinguishes confident from very confident rows,
    as membership attacks do.
    """
    chex.assert_equal_shape([value_B, target_B])
    distance_B = jnp.abs(value_B - jax.lax.stop_gradient(target_B))
    clipped_B = jnp.minimum(distance_B, 1.0)
    return mean(clipped_B * (distance_B - clipped_B / 2), weight_B)


# --- CCU: (b) cross-modal retention ---------------------------------------------------


def retention(
    teacher: Mapping[str, Array],
    student: Mapping[str, Array],
    weight: Mapping[str, Array],
    *,
    multi_label: bool,
) -> Scalar:
    """Returns the KL divergence from the original's predictions, summed over views.

    Args:
        teacher, student: logits `[B, K]` by view: image and fused. The text view has no
            term, because its modules are frozen.
        weight: `[B]` by view.
        multi_label: whether rows have several labels.
    """
    return sum(
        kl_divergence(
            teacher[view], student[view], weight[view], multi_label=multi_label
        )
        for view in teacher
    )


# --- CCU: (c) dual-set contrastive separation -----------------------------------------


def separation(r: LabeledFeatures, u: LabeledFeatures, *, temperature: Scalar) -> Array:
    """Returns a loss that separates retain classes, with unlearn rows as negatives.

    For a retain row with feature h_r, R the other retain rows (w_rp: Jaccard similarity
    of labels) and U the unlearn rows:

        -sum_{p in R} w_rp log(e_rp / (sum_{q in R} e_rq + sum_{u in U} e_ru))
        / sum_{p in R} w_rp,  e_rp = exp(h_r . h_p / temperature)

    SupCon (Khosla et al. 2020) with weighted positives. A stop-gradient on h_u blocks
    gradients of the unlearn features.
    """
    chex.assert_rank([r.h, u.h, r.labels], 2)
    r_G = jax.tree.map(all_gather, r)
    is_self_BxG = (
        jnp.arange(r_G.h.shape[0])[None, :] == global_rows(r.h.shape[0])[:, None]
    )
    other_BxG = ~is_self_BxG & (r_G.weight > 0)
    share_BxG = label_similarity(r.labels, r_G.labels) * other_BxG
    retain_BxG = r.h @ r_G.h.T / temperature
    unlearn_BxG = r.h @ jax.lax.stop_gradient(all_gather(u.h)).T / temperature
    logits = jnp.concatenate(
        [
            jnp.where(other_BxG, retain_BxG, LOG_ZERO),
            jnp.where(all_gather(u.weight) > 0, unlearn_BxG, LOG_ZERO),
        ],
        axis=1,
    )
    log_p_BxG = retain_BxG - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    count_B = share_BxG.sum(1)
    loss_B = -jnp.sum(share_BxG * log_p_BxG, axis=1) / jnp.maximum(count_B, 1e-9)
    return mean(loss_B, r.weight * (count_B > 0))

"""The objectives: arrays in, one scalar out, the same on every device.

The mathematics of the method, and of the baselines, on one page. What the authors of
CCU (Xu et al. 2025, arXiv 2509.23895) minimise is not public: the three objectives
marked CCU are this project's reconstruction from the paper's text and the works named.

Letters: B rows on this device, G rows on all devices, K classes, D embedding size; a
suffix u or r says whose rows: of the unlearn set or of the retain set. Rows count with
a weight `[B]`; a row of weight 0 does not exist. Every scalar is already the mean over
the rows of *all* devices, so that gradients are right under every executor.
"""

import chex
import jax
import jax.numpy as jnp

from ccu_jax.distributed.executors import AXIS

# Finite, and far below any similarity over a temperature: -inf would give NaN
# gradients.
NEVER = -1e9
# The mean over K sigmoid losses is scaled to the size of a softmax loss.
MULTI_LABEL_SCALE = 4.0


def gather(x):
    """Rows `[B, ...]` of this device to the rows `[G, ...]` of all, in device order."""
    return jax.lax.all_gather(x, AXIS, tiled=True)


def mean(value_B, weight_B):
    """Weighted mean over the rows of all devices; 0 where no row has weight."""
    chex.assert_rank([value_B, weight_B], 1)
    chex.assert_equal_shape([value_B, weight_B])
    weight_B = weight_B.astype(value_B.dtype)
    # A row without weight must not spoil the sum, not even with an infinity.
    total = jnp.sum(jnp.where(weight_B > 0, value_B, 0.0) * weight_B)
    total, count = jax.lax.psum((total, jnp.sum(weight_B)), AXIS)
    return total / jnp.maximum(count, 1e-9)


def positives(labels_AxK, labels_BxK):
    """Jaccard similarity `[A, B]` of label sets; for single labels: same or not."""
    chex.assert_rank([labels_AxK, labels_BxK], 2)
    shared = labels_AxK @ labels_BxK.T
    either = labels_AxK.sum(1)[:, None] + labels_BxK.sum(1)[None, :] - shared
    return shared / jnp.maximum(either, 1.0)


def log_weights(weight):
    """Logarithm of weights that may be zero."""
    return jnp.where(weight > 0, jnp.log(jnp.maximum(weight, 1e-9)), NEVER)


# --- classification -------------------------------------------------------------------


def cross_entropy_rows(logits_BxK, target_BxK, *, multi_label):
    """Cross-entropy of each row `[B]` against target probabilities, soft or hard."""
    chex.assert_equal_shape([logits_BxK, target_BxK])
    if multi_label:
        each = jax.nn.softplus(logits_BxK) - target_BxK * logits_BxK
        return MULTI_LABEL_SCALE * each.mean(axis=-1)
    return -jnp.sum(target_BxK * jax.nn.log_softmax(logits_BxK), axis=-1)


def cross_entropy(logits_BxK, target_BxK, weight_B, *, multi_label):
    """Mean cross-entropy: softmax, or the labels' sigmoids where rows have several."""
    rows = cross_entropy_rows(logits_BxK, target_BxK, multi_label=multi_label)
    return mean(rows, weight_B)


def divergence(teacher_BxK, logits_BxK, weight_B, *, multi_label, temperature=1.0):
    """KL divergence from a teacher's predictions to the model's (Hinton et al. 2015).

    Softmax, or Bernoulli per label; times `temperature` squared, so that its gradient
    keeps its size when the temperature changes.
    """
    chex.assert_equal_shape([teacher_BxK, logits_BxK])
    t, s = teacher_BxK / temperature, logits_BxK / temperature
    target = jax.nn.sigmoid(t) if multi_label else jax.nn.softmax(t)
    rows = cross_entropy_rows(s, target, multi_label=multi_label)
    rows = rows - cross_entropy_rows(t, target, multi_label=multi_label)
    return temperature**2 * mean(rows, weight_B)


def alignment(z_image_BxD, z_text_BxD, weight_B, *, temperature):
    """Symmetric contrast of pictures and their texts (Radford et al. 2021)."""
    chex.assert_equal_shape([z_image_BxD, z_text_BxD])
    rows = z_image_BxD.shape[0]
    own = jax.lax.axis_index(AXIS) * rows + jnp.arange(rows)
    exists_G = jnp.where(gather(weight_B) > 0, 0.0, NEVER)
    total = 0.0
    for a, b in ((z_image_BxD, z_text_BxD), (z_text_BxD, z_image_BxD)):
        logits_BxG = a @ gather(b).T / temperature + exists_G
        chosen = jnp.take_along_axis(logits_BxG, own[:, None], axis=1)[:, 0]
        total += mean(jax.nn.logsumexp(logits_BxG, axis=1) - chosen, weight_B)
    return total / 2


# --- CCU: (a) selective visual unlearning ---------------------------------------------


def inverse_contrast(
    h_u,
    h_r,
    labels_u,
    labels_r,
    weight_u,
    weight_r,
    *,
    temperature,
    pull=0.0,
    gate_u=1.0,
    hold=True,
):
    """Inverse contrast: push forgotten pictures off the retained ones of their class.

    For the picture of row u with unit feature z_u, and P(u) the retain rows that share
    labels with it (weighted by Jaccard similarity w):

        log sum_{p in P(u)} w_up exp(z_u . sg(z_p) / temperature)
        - pull * mean_{a not in P(u)} z_u . sg(z_a) / temperature

    SupCon (Khosla et al. 2020) with the roles of positives and negatives swapped, as in
    Contrastive Unlearning (Lee et al. 2024). The stop-gradient keeps retained classes
    where they are. A row whose class is nowhere in the batch is pulled, not pushed.

    Args:
        h_u, h_r: unit features `[B, D]`.
        labels_u, labels_r: multi-hot `[B, K]`.
        weight_u, weight_r: `[B]`.
        temperature: of the similarities.
        pull: strength of the pull towards other classes.
        gate_u: how much each row counts, `[B]`, beside the others that have a weight:
            a row that has been forgotten need not be pushed any further.
        hold: whether retained features stand still (the stop-gradient).
    """
    chex.assert_rank([h_u, h_r, labels_u, labels_r], 2)
    h_G, labels_G = gather(h_r), gather(labels_r)
    h_G = jax.lax.stop_gradient(h_G) if hold else h_G
    exists_G = gather(weight_r) > 0
    share_BxG = positives(labels_u, labels_G) * exists_G
    similar_BxG = h_u @ h_G.T / temperature
    shared_B = share_BxG.sum(1) > 0
    push_B = jax.nn.logsumexp(similar_BxG + log_weights(share_BxG), axis=1)
    push_B = jnp.where(shared_B, push_B, 0.0)
    other_BxG = (share_BxG == 0) & exists_G
    count_B = jnp.maximum(other_BxG.sum(1), 1)
    pull_B = jnp.sum(similar_BxG * other_BxG, axis=1) / count_B
    has_B = weight_u * (shared_B | ((pull > 0) & (other_BxG.sum(1) > 0)))
    return mean((push_B - pull * pull_B) * gate_u, has_B)


def pair_dissociation(
    z_image_u,
    z_text_u,
    z_text_r,
    labels_u,
    labels_r,
    weight_u,
    weight_r,
    *,
    offset=0.0,
    two_sided=False,
):
    """Loosen a forgotten picture from its own text, no further than is natural.

        (z_image_u . z_text_u - r_u - offset)^2,  r_u = sg mean_{p in P(u)} z_image_u .
        z_text_p

    one-sided unless `two_sided`: the picture may be as close to its text as to texts of
    other rows of its class plus `offset` (what pictures never seen show). Needs no
    negative pairs. Texts are fixed by a stop-gradient.
    """
    chex.assert_equal_shape([z_image_u, z_text_u])
    z_G, labels_G = jax.lax.stop_gradient(gather(z_text_r)), gather(labels_r)
    share_BxG = positives(labels_u, labels_G) * (gather(weight_r) > 0)
    count_B = share_BxG.sum(1)
    usual_B = jnp.sum(z_image_u @ z_G.T * share_BxG, axis=1) / jnp.maximum(
        count_B, 1e-9
    )
    own_B = jnp.sum(z_image_u * jax.lax.stop_gradient(z_text_u), axis=1)
    excess_B = own_B - jax.lax.stop_gradient(usual_B) - offset
    if not two_sided:
        excess_B = jnp.maximum(excess_B, 0.0)
    return mean(excess_B**2, weight_u * (count_B > 0))


def level(value_B, target_B, weight_B):
    """Bring a value of each row to its target (Huber 1964): mean of

        d^2 / 2 where |d| <= 1, else |d| - 1/2,  d = value - sg(target)

    For confidences that an attack reads: a cross-entropy near zero hardly tells a sure
    row from a very sure one.
    """
    chex.assert_equal_shape([value_B, target_B])
    apart_B = jnp.abs(value_B - jax.lax.stop_gradient(target_B))
    near_B = jnp.minimum(apart_B, 1.0)
    return mean(near_B * (apart_B - near_B / 2), weight_B)


def distance(a_BxD, b_BxD, weight_B):
    """Mean squared distance of features (MultiDelete: Cheng & Amiri 2024)."""
    chex.assert_equal_shape([a_BxD, b_BxD])
    return mean(jnp.mean((a_BxD - b_BxD) ** 2, axis=1), weight_B)


# --- CCU: (b) cross-modal retention ---------------------------------------------------


def retention(teacher, student, weight_r, *, multi_label):
    """Keep what the original says of retained rows, alone and together with the text.

    KL divergence from the original's predictions to the model's, in the picture's view
    and in the fused view. The text's own view needs no term where its branch is frozen.

    Args:
        teacher, student: logits `{"image": [B, K], "fused": [B, K]}`.
        weight_r: `{"image": [B], "fused": [B]}`.
        multi_label: whether rows have several labels.
    """
    return sum(
        divergence(
            teacher[view], student[view], weight_r[view], multi_label=multi_label
        )
        for view in teacher
    )


# --- CCU: (c) dual-set contrastive separation -----------------------------------------


def separation(h_r, h_u, labels_r, weight_r, weight_u, *, temperature):
    """Keep the retain set's structure, with the unlearn set as negatives only.

    SupCon (Khosla et al. 2020) over the retain rows, positives weighted by Jaccard
    similarity; the forgotten pictures stand in the denominator behind a stop-gradient,
    so that what happens to them does not tear at the retained classes.

    Args: unit features `h_r`, `h_u` `[B, D]`, labels `[B, K]`, weights `[B]`.
    """
    chex.assert_rank([h_r, h_u, labels_r], 2)
    rows = h_r.shape[0]
    own = jax.lax.axis_index(AXIS) * rows + jnp.arange(rows)
    h_G, labels_G = gather(h_r), gather(labels_r)
    exists_G = gather(weight_r) > 0
    other_BxG = (jnp.arange(h_G.shape[0])[None, :] != own[:, None]) & exists_G
    share_BxG = positives(labels_r, labels_G) * other_BxG
    retain_BxG = h_r @ h_G.T / temperature
    h_uG = jax.lax.stop_gradient(gather(h_u))
    unlearn_BxG = h_r @ h_uG.T / temperature
    all_BxG = jnp.concatenate(
        [
            jnp.where(other_BxG, retain_BxG, NEVER),
            jnp.where(gather(weight_u) > 0, unlearn_BxG, NEVER),
        ],
        axis=1,
    )
    log_p_BxG = retain_BxG - jax.nn.logsumexp(all_BxG, axis=1, keepdims=True)
    count_B = share_BxG.sum(1)
    each_B = -jnp.sum(share_BxG * log_p_BxG, axis=1) / jnp.maximum(count_B, 1e-9)
    return mean(each_B, weight_r * (count_B > 0))

"""What a model that never saw a forgotten picture would say of it.

The closed loop of ccu_plus. A retrained model judges a picture that it never saw by its
likeness to retained ones. So for each forgotten picture there is a retain-only
prediction (a ridge on trunk features) that says which labels look likely, and a rank
that says how easy the picture is; how *confident* pictures of that rank are is read off
held-out rows under the current model, again and again while it changes.

Confidence is `g = -log(-sum_k log p_k)`, p_k the probability of the true value of label
k (of the true class, for single labels): unbounded at both ends.

Letters: U forgotten rows, V held-out rows, R retained rows, K classes, F features.
Rows count where `weight` is true; the others fill up tables and may hold anything
finite.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ccu_jax.evaluate.ridge import ridge
from ccu_jax.methods.ccu.masked_statistics import (
    ecdf,
    fit_line,
    mean,
    predict_line,
    quantile,
    rank,
    sort_valid,
    std,
    uniform_per_row,
)

SMALL = 1e-30
# Strength of the ridge on features of an untrained trunk: they are few and plain.
FRESH_RIDGE = 0.3
# Targets are corrected by no more than so many standard deviations.
MOST_LEAD = 3.0


class Ranks(NamedTuple):
    """What is fixed before the first step.

    `base_UxK`: retain-only logits; `text_UxK`: what the texts add to them in the fused
    view; `known_K`: classes that the retain set has; `image_U`, `fused_U`: ranks in
    (0, 1); `free`: the forgotten rows are not like the held-out ones (a whole class, a
    cluster): their targets ignore true labels and confidences.
    """

    base_UxK: jax.Array
    text_UxK: jax.Array
    known_K: jax.Array
    image_U: jax.Array
    fused_U: jax.Array
    free: jax.Array


def log_likelihood(logits, labels, *, multi_label):
    """Sum of the log-probabilities of the true label values, `[N]`."""
    if multi_label:
        return -jax.nn.softplus(jnp.where(labels > 0, -logits, logits)).sum(axis=1)
    # Not by way of the softmax, which cannot tell a sure row from a very sure one.
    true = jnp.sum(labels * logits, axis=1)
    other = jax.nn.logsumexp(jnp.where(labels > 0, -jnp.inf, logits), axis=1)
    return -jax.nn.softplus(other - true)


def confidence(logits, labels, *, multi_label):
    """`g` of each row, `[N]`."""
    total = log_likelihood(logits, labels, multi_label=multi_label)
    return -jnp.log(jnp.maximum(-total, SMALL))


def as_logits(scores):
    """Ridge scores near 0..1 of several labels as logits."""
    return jax.scipy.special.logit(jnp.clip(scores, 0.02, 0.98))


def margin(scores, labels, *, multi_label):
    """How well scores `[N, K]` fit the labels, `[N]`.

    Single labels: the true score less the highest other one. Several: their confidence,
    which depends most of all on how many there are and how common they are.
    """
    if multi_label:
        return confidence(as_logits(scores), labels, multi_label=True)
    other = jnp.where(labels > 0, -jnp.inf, scores).max(axis=1)
    return (scores * labels).sum(axis=1) - other


def recall_at_k(scores, labels):
    """Share of each row's true labels among its as many highest scores, `[N]`."""
    place = jnp.argsort(jnp.argsort(-scores, axis=1), axis=1)
    count = labels.sum(axis=1, keepdims=True)
    return ((place < count) * labels).sum(axis=1) / jnp.maximum(count[:, 0], 1)


def nearest_value(x_u, x_v, y_v, weight_v, choice_U):
    """For each u, y of a v with a like x: one of the nearest tenth, as `choice` says.

    Spread and skew of y may change along x, and nothing is extrapolated.
    """
    x_v = jnp.where(weight_v, x_v, jnp.inf)
    order, count = jnp.argsort(x_v), weight_v.sum()
    reach = (choice_U - 0.5) * jnp.maximum(count // 10, 1)
    place = jnp.searchsorted(x_v[order], x_u) + jnp.round(reach).astype(jnp.int32)
    return y_v[order][jnp.clip(place, 0, jnp.maximum(count - 1, 0))]


def with_confidence(base_NxK, labels_NxK, g_N, *, multi_label):
    """Probabilities `[N, K]` whose confidence is `g`, otherwise as `base` says.

    The logits `base` are moved along the direction of the true labels, as far as
    needed.
    """
    total_N = -jnp.exp(-g_N)
    if not multi_label:
        p = jnp.exp(total_N)[:, None]
        other = jax.nn.softmax(jnp.where(labels_NxK > 0, -1e9, base_NxK))
        return p * labels_NxK + (1 - p) * other

    toward = 2 * labels_NxK - 1

    def short(move_N):
        moved = base_NxK + move_N[:, None] * toward
        return log_likelihood(moved, labels_NxK, multi_label=True) < total_N

    # The likelihood grows with the move.
    most = jnp.full_like(total_N, 30.0)
    move_N = _bisect(short, -most, most)
    return jax.nn.sigmoid(base_NxK + move_N[:, None] * toward)


def _bisect(short, low, high):
    """The largest value between low and high, nearly, at which it still falls short."""

    # A loop of the program: written out it would be compiled thirty times.
    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        less = short(middle)
        return jnp.where(less, middle, low), jnp.where(less, high, middle)

    return jax.lax.fori_loop(0, 30, halve, (low, high))[0]


def prepare(u, v, r, key, *, strength, multi_label) -> Ranks:
    """All that is fixed: see `Ranks`.

    Args:
        u, v, r: rows with `pooled` features of the trunk and `fresh` ones of a trunk
            that was never trained `[N, F]`, `labels`, the original's logits `image`,
            `text`, `fused` `[N, K]`, and which of them count, `weight`.
        key: for the part of the ranks that the features do not explain.
        strength: of the ridge.
        multi_label: whether rows have several labels.
    """
    predict, score_r = ridge(r["pooled"], r["labels"], r["weight"], strength)
    score_u, score_v = predict(u["pooled"]), predict(v["pooled"])
    kind = {"multi_label": multi_label}
    key = jax.random.split(key)
    image_u = _image_ranks(u, v, r, score_u, score_v, key[0], kind)
    common = (r["labels"] * r["weight"][:, None]).sum(0)
    known = common > 0
    if multi_label:
        base = as_logits(score_u)
        text = u["text"] - as_logits(common / jnp.maximum(r["weight"].sum(), 1))
        beta = jnp.ones(())
    else:
        base, text = score_u, jax.nn.log_softmax(u["text"])
        sure = mean(jax.nn.softmax(v["image"]).max(1), v["weight"])
        beta = _temperature(score_v, v["weight"], sure)
    return Ranks(
        base_UxK=beta * base,
        text_UxK=text,
        known_K=known,
        image_U=image_u,
        fused_U=rank(uniform_per_row(key[1], len(image_u)), u["weight"]),
        free=is_shifted(
            recall_at_k(score_u, u["labels"]),
            recall_at_k(score_r, r["labels"]),
            u["weight"],
            r["weight"],
        ),
    )


def _image_ranks(u, v, r, score_u, score_v, key, kind):
    """How hard each forgotten picture is beside the held-out ones, in (0, 1).

    That must not be asked of the trunk: it has learned them, so all look easy. A trunk
    that never learned anything says it without bias. The order among the forgotten
    rows, all of them learned, the original's trunk knows better.
    """
    plain, _ = ridge(r["fresh"], r["labels"], r["weight"], FRESH_RIDGE)
    place = ecdf(
        margin(plain(u["fresh"]), u["labels"], **kind),
        margin(plain(v["fresh"]), v["labels"], **kind),
        v["weight"],
    )
    order = predict_with_residual(
        margin(score_v, v["labels"], **kind)[:, None],
        confidence(v["image"], v["labels"], **kind),
        v["weight"],
        margin(score_u, u["labels"], **kind)[:, None],
        key,
    )
    among = jnp.argsort(jnp.argsort(jnp.where(u["weight"], order, jnp.inf)))
    return jnp.where(u["weight"], sort_valid(place, u["weight"])[among], 0.5)


def is_shifted(hit_U, hit_R, weight_U, weight_R):
    """Whether retained rows tell of the forgotten ones far worse than of each other."""
    parts = ((hit_U, weight_U), (hit_R, weight_R))
    error = jnp.sqrt(
        sum(std(hit, w) ** 2 / jnp.maximum(w.sum(), 1) for hit, w in parts)
    )
    apart = mean(hit_R, weight_R) - mean(hit_U, weight_U)
    return apart > jnp.maximum(4 * error, 0.1)


def predict_with_residual(x_v, y_v, weight_v, x_u, key):
    """Predict y for u as on v, with the spread that the prediction leaves out."""
    line = fit_line(x_v, y_v, weight_v)
    rest = sort_valid(y_v - predict_line(line, x_v), weight_v)
    drawn = rest[(uniform_per_row(key, len(x_u)) * weight_v.sum()).astype(jnp.int32)]
    return predict_line(line, x_u) + drawn


def _temperature(scores, weight, wanted):
    """The factor that makes the mean largest probability of `scores` what is wanted."""

    def short(factor):
        return mean(jax.nn.softmax(factor * scores).max(1), weight) < wanted

    return _bisect(short, jnp.zeros(()), jnp.full((), 100.0))


def current(ranks: Ranks, u, v, lead, *, gain, multi_label):
    """Targets under the model as it is.

    Image view: the confidence at this row's rank among held-out rows. Fused view: that
    of a held-out row whose picture and text are as telling together; a line fitted on
    held-out rows says how the two add up, the picture counts with its *target* and the
    text with its own confidence. The text is not to be forgotten, so what it adds to
    the fused view stays.

    A model that is fitted to targets ends a little above them. So the loop is closed on
    what came of them, too: `lead` grows while forgotten rows stand higher among
    held-out ones than they should, and is taken off the targets.

    Args:
        ranks: from `prepare`.
        u, v: rows with `labels`, the original's logits `text` and the current model's
            `image` and `fused`, `[N, K]`, and `weight`.
        lead: by view, what the last call returned; zeros at first.
        gain: how fast it grows.
        multi_label: whether rows have several labels.

    Returns:
        `image`, `fused`: target probabilities `[U, K]`; `level`: target confidences
        `{view: [U]}`; `lead`.
    """
    kind = {"multi_label": multi_label}
    views = ("image", "text", "fused")
    held = {view: confidence(v[view], v["labels"], **kind) for view in views}
    now = {view: confidence(u[view], u["labels"], **kind) for view in views}
    image_u = quantile(ranks.image_U, held["image"], v["weight"])
    x_u = jnp.stack([image_u, now["text"]], axis=1)
    x_v = jnp.stack([held["image"], held["text"]], axis=1)
    line = fit_line(x_v, held["fused"], v["weight"])
    fused_u = nearest_value(
        predict_line(line, x_u),
        predict_line(line, x_v),
        held["fused"],
        v["weight"],
        ranks.fused_U,
    )
    level, grown = {}, {}
    for view, aim_U in (("image", image_u), ("fused", fused_u)):
        of = held[view], v["weight"]
        above = mean(ecdf(now[view], *of) - ecdf(aim_U, *of), u["weight"])
        most = MOST_LEAD * std(*of)
        # Bounded: a model that cannot follow is not to be driven ever further.
        grown[view] = jnp.clip(
            lead[view] + gain * std(*of) * above,
            -most,
            most,
        )
        level[view] = aim_U - grown[view]
    return {
        **_probabilities(ranks, u["labels"], level, multi_label=multi_label),
        "level": level,
        "lead": grown,
    }


def _probabilities(ranks: Ranks, labels_UxK, level, *, multi_label):
    """Target probabilities `[U, K]` of both views with the confidences `level`."""
    kind = {"multi_label": multi_label}
    base, known = ranks.base_UxK, ranks.known_K
    # A class that nobody retains: the picture says no to it, the text may still say
    # yes.
    never = jnp.where(known, base, -10.0 if multi_label else -1e9)
    usual = jnp.sum(base * known, axis=1, keepdims=True) / jnp.maximum(known.sum(), 1)
    both = jnp.where(known, base, usual) + ranks.text_UxK
    squash = jax.nn.sigmoid if multi_label else jax.nn.softmax
    aims = {
        "image": (never, with_confidence(base, labels_UxK, level["image"], **kind)),
        "fused": (both, with_confidence(both, labels_UxK, level["fused"], **kind)),
    }
    return {
        view: jnp.where(ranks.free, squash(plain), aim)
        for view, (plain, aim) in aims.items()
    }

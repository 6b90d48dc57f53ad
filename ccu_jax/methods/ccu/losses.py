"""Loss terms and optimizer that `ccu` and `ccu_plus` share.

In the functions below, `u` and `r` are batch rows of the unlearn set and of the retain
set, `out_u` and `out_r` the model's outputs on them, and `c` the hyperparameters.
"""

import optax

from ccu_jax import objectives
from ccu_jax.methods.optimizers import cosine_schedule, scale_by_learning_rate
from ccu_jax.models import VIEWS, VISUAL, unit


def adam():
    # Retention has no gradient where the model still is the original: with Adam's usual
    # epsilon the rounding noise there, which differs between devices, becomes a step.
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(eps=1e-5),
        scale_by_learning_rate(),
    )


def rates(section):
    return {"rate": {"all": cosine_schedule(section.learning_rate, section.steps)}}


def contrasts(c, u, r, out_u, out_r, *, offset=0.0, two_sided=False):
    """The weighted contrastive objectives that both forms share, by name."""
    weight_u, weight_r = u["has_image"], r["has_image"]
    terms = {}
    if c.is_active("pair_dissociation"):
        terms["pair_dissociation"] = c.pair_dissociation * objectives.pair_dissociation(
            out_u.z_image,
            u["z_text"],
            r["z_text"],
            u["labels"],
            r["labels"],
            weight_u & u["has_text"],
            weight_r & r["has_text"],
            offset=offset,
            two_sided=two_sided,
        )
    if c.is_active("separation"):
        terms["separation"] = c.separation * objectives.separation(
            unit(out_r.h_image),
            unit(out_u.h_image),
            r["labels"],
            weight_r,
            weight_u,
            temperature=c.temperature,
        )
    return terms


def retention(weight, r, out_r, multi_label, whole=True):
    """Weighted retention; `whole`: rows whose fused view sees all that it has."""
    teacher = {view: r[f"original_{view}"] for view in VISUAL}
    student = {view: getattr(out_r, view) for view in VISUAL}
    counts = {"image": r["has_image"], "fused": r["has_image"] & whole}
    return weight * objectives.retention(
        teacher, student, counts, multi_label=multi_label
    )


def logits_of(rows):
    """The original's logits of all views, with the labels."""
    names = {view: rows[f"original_{view}"] for view in VIEWS}
    return {**names, "labels": rows["labels"]}

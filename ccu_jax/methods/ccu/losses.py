"""Optimizer and weighted objectives that `ccu` and `ccu_plus` share.

`u` and `r` are the unlearn and retain rows of a batch, `out_u` and `out_r` the model's
outputs on them, and `hp` the hyperparameters. The objectives (a), (b) and (c) are those
of `objectives.py`.
"""

from typing import Any

import jax
import optax

from ccu_jax import objectives
from ccu_jax.methods.hyperparameter_pytree import Hyperparameters
from ccu_jax.methods.optimizers import (
    CosineSchedule,
    cosine_schedule,
    scale_by_learning_rate,
)
from ccu_jax.models import VIEWS, VISUAL, Outputs, unit
from ccu_jax.objectives import LabeledFeatures

Rows = dict[str, jax.Array]


def make_adam() -> optax.GradientTransformationExtraArgs:
    """Returns Adam with clipped gradients and a learning rate from its inputs."""
    # Retention has no gradient at the original. With Adam's default epsilon, rounding
    # errors, which depend on the number of devices, would become full steps there.
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(eps=1e-5),
        scale_by_learning_rate(),
    )


def adam_inputs(config: Any) -> dict[str, dict[str, CosineSchedule]]:
    """Returns the inputs of `make_adam` for a configuration of CCU."""
    return {"rate": {"all": cosine_schedule(config.learning_rate, config.steps)}}


def image_features(rows: Rows, outputs: Outputs) -> LabeledFeatures:
    """Returns the unit image features of rows; rows without an image have no weight."""
    return LabeledFeatures(unit(outputs.h_image), rows["labels"], rows["has_image"])


def original_logits(rows: Rows) -> Rows:
    """Returns the original's logits of cached rows, by view."""
    return {view: rows[f"original_{view}"] for view in VIEWS}


def contrastive_terms(
    hp: Hyperparameters,
    u: Rows,
    r: Rows,
    out_u: Outputs,
    out_r: Outputs,
    *,
    offset: jax.Array | float = 0.0,
    two_sided: bool = False,
) -> dict[str, jax.Array]:
    """Returns the weighted pair dissociation (a) and separation (c), if active.

    `offset` and `two_sided` are those of `objectives.pair_dissociation`.
    """
    terms = {}
    if hp.is_active("pair_dissociation"):
        text_u, text_r = (
            LabeledFeatures(x["z_text"], x["labels"], x["has_image"] & x["has_text"])
            for x in (u, r)
        )
        terms["pair_dissociation"] = (
            hp.pair_dissociation
            * objectives.pair_dissociation(
                out_u.z_image, text_u, text_r, offset=offset, two_sided=two_sided
            )
        )
    if hp.is_active("separation"):
        terms["separation"] = hp.separation * objectives.separation(
            image_features(r, out_r),
            image_features(u, out_u),
            temperature=hp.temperature,
        )
    return terms


def retention_term(
    weight: Any,
    rows: Rows,
    outputs: Outputs,
    *,
    multi_label: bool,
    has_all_modalities: jax.Array | bool = True,
) -> jax.Array:
    """Returns the weighted retention (b).

    In the fused view it leaves out rows without `has_all_modalities`, whose image or
    text was dropped for this step.
    """
    teacher = original_logits(rows)
    weights = {
        "image": rows["has_image"],
        "fused": rows["has_image"] & has_all_modalities,
    }
    return weight * objectives.retention(
        {view: teacher[view] for view in VISUAL},
        {view: getattr(outputs, view) for view in VISUAL},
        weights,
        multi_label=multi_label,
    )

"""CCU, cross-modal contrastive unlearning, as in the paper.

Xu et al. (2025), arXiv 2509.23895. The authors' losses are not public; this is a
reconstruction. The objectives (a), (b) and (c) are in `objectives.py`. `ccu_plus`
shares the optimizer and the weighted objectives.

`u` and `r` are the unlearn and retain rows of a batch, `out_u` and `out_r` the model's
outputs on them, and `hp` the hyperparameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ccu_jax import objectives
from ccu_jax.methods import cached_features, programs
from ccu_jax.methods.optimizers import scale_by_learning_rate
from ccu_jax.methods.problem import Hyperparameters, Problem, Rows
from ccu_jax.models import TAIL, VISUAL, Outputs, l2_normalize
from ccu_jax.objectives import LabeledFeatures
from ccu_jax.train.program import Program


def ccu(problem: Problem) -> Program:
    """CCU (Xu et al. 2025): trains the image modules after the trunk.

        (a) inverse contrast + pair dissociation  on unlearn rows
        (b) + retention                           on retain rows
        (c) + separation                          on both

    each with a weight. With `stop` it ends once unlearn images are recognized no better
    than held-out images. The trunk and the text branch are frozen, so CCU changes
    predictions, but not what the trunk's weights have memorized.
    """
    config = problem.method_config
    cached = cached_features.build_feature_tables(problem, config.max_retain_rows)

    def loss(params, frozen, aux, batch, step):
        hp, u, r = frozen["hp"], batch["unlearn"], batch["retain"]
        params = {**frozen["modules"], **params}
        outputs = programs.forward_parts(problem.model, params, batch)
        out_u, out_r = outputs["unlearn"], outputs["retain"]
        terms = contrastive_terms(hp, u, r, out_u, out_r)
        if hp.is_active("inverse_contrast"):
            contrast = objectives.inverse_contrast(
                image_features(u, out_u),
                image_features(r, out_r),
                temperature=hp.temperature,
                pull=hp.pull,
            )
            terms["inverse_contrast"] = hp.inverse_contrast * contrast
        if hp.is_active("retention"):
            terms["retention"] = retention_term(
                hp.retention, r, out_r, multi_label=problem.multi_label
            )
        return sum(terms.values(), jnp.zeros(())), terms

    return programs.make_program(
        problem,
        loss,
        cached_features.plan_feature_batches(problem, cached),
        modules=TAIL,
        sharded_tables=cached.tables,
        optimizer=make_adam(),
    )


def make_adam() -> optax.GradientTransformationExtraArgs:
    """Returns Adam with gradient clipping."""
    # Retention has no gradient at the original. With Adam's default epsilon, rounding
    # errors, which depend on the number of devices, would become full steps there.
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(eps=1e-5),
        scale_by_learning_rate("rest"),
    )


def image_features(rows: Rows, outputs: Outputs) -> LabeledFeatures:
    """Returns normalized image features; rows without an image have weight 0."""
    return LabeledFeatures(
        l2_normalize(outputs.h_image), rows["labels"], rows["has_image"]
    )


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
    """Returns the weighted losses pair dissociation (a) and separation (c), if active.

    For `offset` and `two_sided`, see `objectives.pair_dissociation`.
    """
    terms = {}
    if hp.is_active("pair_dissociation"):
        text_u, text_r = (
            LabeledFeatures(x["z_text"], x["labels"], x["has_image"] & x["has_text"])
            for x in (u, r)
        )
        dissociation = objectives.pair_dissociation(
            out_u.z_image, text_u, text_r, offset=offset, two_sided=two_sided
        )
        terms["pair_dissociation"] = hp.pair_dissociation * dissociation
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
    """Returns the weighted retention loss (b).

    The fused view excludes rows whose image or text was dropped in this step.
    """
    has_image = rows["has_image"]
    return weight * objectives.retention(
        {view: rows[f"original_{view}"] for view in VISUAL},
        {view: getattr(outputs, view) for view in VISUAL},
        {"image": has_image, "fused": has_image & has_all_modalities},
        multi_label=multi_label,
    )

"""CCU, cross-modal contrastive unlearning, in the form of the paper.

Xu et al. (2025), arXiv 2509.23895. The authors' losses are not public; this is a
reconstruction, see `objectives.py`.
"""

import jax.numpy as jnp

from ccu_jax import objectives
from ccu_jax.methods import cached_features
from ccu_jax.methods.ccu import losses
from ccu_jax.methods.hyperparameter_pytree import Hyperparameters
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.stopping import with_stop_rule
from ccu_jax.models import TAIL
from ccu_jax.train.program import Program


def ccu(problem: Problem) -> Program:
    """CCU (Xu et al. 2025): trains the image modules behind the trunk.

        (a) inverse contrast + pair dissociation  on unlearn rows
        (b) + retention                           on retain rows
        (c) + separation                          on both

    each with a weight. With `stop` it ends when unlearn images are recognized no better
    than held-out ones. Trunk and text branch stay unchanged to the bit, so CCU changes
    predictions, but not what the trunk's weights have memorized.
    """
    config, model = problem.method_config, problem.model
    cached = cached_features.build_feature_tables(problem, config.max_retain_rows)
    trained, frozen_modules = cached_features.split_modules(problem, TAIL)

    def loss(params, frozen, aux, batch, step):
        hp, u, r = frozen["hp"], batch["unlearn"], batch["retain"]
        rows, split_parts = cached_features.concat_parts(batch)
        outputs = split_parts(model.apply({**frozen["modules"], **params}, rows))
        out_u, out_r = outputs["unlearn"], outputs["retain"]
        terms = losses.contrastive_terms(hp, u, r, out_u, out_r)
        if hp.is_active("inverse_contrast"):
            contrast = objectives.inverse_contrast(
                losses.image_features(u, out_u),
                losses.image_features(r, out_r),
                temperature=hp.temperature,
                pull=hp.pull,
            )
            terms["inverse_contrast"] = hp.inverse_contrast * contrast
        if hp.is_active("retention"):
            terms["retention"] = losses.retention_term(
                hp.retention, r, out_r, multi_label=problem.multi_label
            )
        return sum(terms.values(), jnp.zeros(())), terms

    program = Program(
        params=trained,
        frozen={
            "modules": frozen_modules,
            "hp": Hyperparameters.from_config(config),
        },
        loss=loss,
        optimizer=losses.make_adam(),
        optimizer_inputs=losses.adam_inputs(config),
        sharded_tables=cached.tables,
        plan=cached_features.plan_feature_batches(problem, cached),
    )
    if not config.stop:
        return program
    return with_stop_rule(problem, program, names=("unlearn", "held"))

"""CCU, cross-modal contrastive unlearning, in the form of the paper.

Xu et al. (2025), arXiv 2509.23895. The authors' losses are not public; this form is
this project's reconstruction of them.
"""

import jax.numpy as jnp

from ccu_jax import objectives
from ccu_jax.methods.cached_features import (
    build_feature_tables,
    concat_parts,
    plan_batches,
    split_modules,
)
from ccu_jax.methods.ccu.losses import adam, contrasts, rates, retention
from ccu_jax.methods.hyperparameters import Hyperparameters
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.stopping import with_stop_rule
from ccu_jax.models import TAIL, unit
from ccu_jax.train.program import Program


def ccu(problem: Problem) -> Program:
    """The paper-like form.

    (a) inverse contrast and pair dissociation on the unlearn set, (b) retention of the
    original's predictions on the retain set, (c) dual-set separation; with `stop` it
    ends when the pictures of the unlearn set are recognised no better than held-out
    ones.
    """
    section, model = problem.method_config, problem.model
    multi_label = problem.multi_label
    cached = build_feature_tables(problem, section.max_retain_rows)
    train, frozen = split_modules(problem, TAIL)

    def loss(params, frozen, aux, batch, step):
        c, u, r = frozen["c"], batch["unlearn"], batch["retain"]
        every, cut = concat_parts(batch)
        out = cut(model.apply({**frozen["parts"], **params}, every))
        out_u, out_r = out["unlearn"], out["retain"]
        terms = contrasts(c, u, r, out_u, out_r)
        if c.is_active("inverse_contrast"):
            terms["inverse_contrast"] = (
                c.inverse_contrast
                * objectives.inverse_contrast(
                    unit(out_u.h_image),
                    unit(out_r.h_image),
                    u["labels"],
                    r["labels"],
                    u["has_image"],
                    r["has_image"],
                    temperature=c.temperature,
                    pull=c.pull,
                )
            )
        if c.is_active("retention"):
            terms["retention"] = retention(c.retention, r, out_r, multi_label)
        return sum(terms.values(), jnp.zeros(())), terms

    program = Program(
        params=train,
        frozen={"parts": frozen, "c": Hyperparameters.from_section(section)},
        loss=loss,
        optimizer=adam(),
        optimizer_inputs=rates(section),
        sharded_tables=cached.parts,
        plan=plan_batches(problem, cached, section),
    )
    if not section.stop:
        return program
    return with_stop_rule(problem, program, names=("unlearn", "held"))

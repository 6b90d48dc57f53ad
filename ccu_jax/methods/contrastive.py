"""Contrastive unlearning methods from the literature, for classifiers."""

import jax
import numpy as np

from ccu_jax import objectives
from ccu_jax.methods.cached_features import concat_parts
from ccu_jax.methods.full_model import forward_both, train_all_modules
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.reference import make_task_loss
from ccu_jax.models import unit
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program


def contrastive_unlearning(problem: Problem) -> Program:
    """Push pictures off their class and towards the others (Lee et al. 2024).

    `unlearn * inverse_contrast(pull=1) + classify * CE(retain)` on the features before
    the head; each batch of the unlearn set meets `repeats` batches of the retain set.
    Without the stop-gradient on retained features, as in the authors' code.
    """
    section, sets = problem.method_config, problem.sets
    passes = problem.count_steps(section.epochs, section.unlearn_batch, sets.unlearn)
    unlearn = problem.plan_batches(
        sets.unlearn, section.unlearn_batch, passes, "unlearn"
    )
    unlearn = np.repeat(unlearn, section.repeats, axis=0)
    retain = problem.plan_batches(sets.retain, section.batch, len(unlearn), "retain")
    judge = make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        c = frozen["c"]
        out_r, retain, out_u, rows = forward_both(problem, params, batch)
        push = objectives.inverse_contrast(
            unit(out_u.h_image),
            unit(out_r.h_image),
            rows["labels"],
            retain["labels"],
            rows["has_image"],
            retain["image_weight"],
            temperature=c.temperature,
            pull=1.0,
            hold=False,
        )
        return c.contrast_weight * push + c.task_weight * judge(out_r, retain), {
            "push": push
        }

    return train_all_modules(problem, loss, {"retain": retain, "unlearn": unlearn})


def coun(problem: Problem) -> Program:
    """Train on with the retain set, and contrast its pictures (Khalil et al. 2025).

    CoUn: `CE(retain) + contrast * InfoNCE` of two random changes of the same picture.
    The unlearn set is not looked at: it follows the retain rows that it is like.
    """
    section, sets, train = problem.method_config, problem.sets, problem.config.train
    steps = problem.count_steps(section.epochs, section.batch, sets.retain)
    judge = make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        c, rows = frozen["c"], batch["retain"]
        again = jax.vmap(jax.random.fold_in, (0, None))(rows["key"], 7)
        pair = {"one": augment(rows, rows["key"], train)}
        pair["two"] = {**augment(rows, again, train), "key": again}
        every, cut = concat_parts(pair)
        out = cut(problem.model.apply(params, every, keys=every["key"]))
        near = objectives.alignment(
            unit(out["one"].h_image),
            unit(out["two"].h_image),
            pair["one"]["image_weight"],
            temperature=c.temperature,
        )
        return judge(out["one"], pair["one"]) + c.contrast_weight * near, {
            "contrast": near
        }

    return train_all_modules(
        problem,
        loss,
        {"retain": problem.plan_batches(sets.retain, section.batch, steps, "retain")},
    )

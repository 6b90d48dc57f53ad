"""Contrastive unlearning methods from the literature."""

import jax
import numpy as np

from ccu_jax import objectives
from ccu_jax.methods.all_modules import forward_both, train_all_modules
from ccu_jax.methods.cached_features import concat_parts
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.reference import make_task_loss
from ccu_jax.models import unit
from ccu_jax.models.augmentation import augment
from ccu_jax.objectives import LabeledFeatures
from ccu_jax.train.program import Program


def contrastive_unlearning(problem: Problem) -> Program:
    """Contrastive Unlearning (Lee et al. 2024).

        contrast_weight * inverse_contrast(pull=1) + task_weight * CE(retain)

    on the features before the head: unlearn images are pushed off the retain images of
    their class and pulled towards other classes. Each unlearn batch is used with
    `repeats` retain batches. Gradients also reach the retain features, as in the
    authors' code.
    """
    config, sets = problem.method_config, problem.sets
    num_batches = problem.count_steps(config.epochs, config.unlearn_batch, sets.unlearn)
    unlearn = problem.plan_batches(
        sets.unlearn, config.unlearn_batch, num_batches, "unlearn"
    )
    unlearn = np.repeat(unlearn, config.repeats, axis=0)
    retain = problem.plan_batches(sets.retain, config.batch, len(unlearn), "retain")
    task_loss = make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        hp = frozen["hp"]
        out_r, retain, out_u, unlearn = forward_both(problem, params, batch)
        h_u, h_r = unit(out_u.h_image), unit(out_r.h_image)
        push = objectives.inverse_contrast(
            LabeledFeatures(h_u, unlearn["labels"], unlearn["has_image"]),
            LabeledFeatures(h_r, retain["labels"], retain["image_weight"]),
            temperature=hp.temperature,
            pull=1.0,
            stop_retain_gradient=False,
        )
        total = hp.contrast_weight * push + hp.task_weight * task_loss(out_r, retain)
        return total, {"push": push}

    return train_all_modules(problem, loss, {"retain": retain, "unlearn": unlearn})


def coun(problem: Problem) -> Program:
    """CoUn (Khalil et al. 2025).

        CE(retain) + contrast_weight * InfoNCE

    between two augmentations of the same retain image. The unlearn set is not used: its
    predictions change with those of similar retain rows.
    """
    config, sets, train = problem.method_config, problem.sets, problem.train_config
    steps = problem.count_steps(config.epochs, config.batch, sets.retain)
    task_loss = make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        hp, rows = frozen["hp"], batch["retain"]
        second_keys = jax.vmap(jax.random.fold_in, (0, None))(rows["key"], 7)
        first = augment(rows, rows["key"], train)
        second = {**augment(rows, second_keys, train), "key": second_keys}
        inputs, split_parts = concat_parts({"first": first, "second": second})
        outputs = split_parts(problem.model.apply(params, inputs, keys=inputs["key"]))
        contrast = objectives.info_nce(
            unit(outputs["first"].h_image),
            unit(outputs["second"].h_image),
            first["image_weight"],
            temperature=hp.temperature,
        )
        total = task_loss(outputs["first"], first) + hp.contrast_weight * contrast
        return total, {"contrast": contrast}

    plan = problem.plan_batches(sets.retain, config.batch, steps, "retain")
    return train_all_modules(problem, loss, {"retain": plan})

"""Unlearning methods from the literature that train every part by the task's loss.

What is to be forgotten are pictures: where a method works against what was learned of
the unlearn set, it does so in the views that see the picture (`VISUAL`). What the text
alone says is left out of it, and kept by the retain set's loss as well as that can.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.methods import optimizers, reference
from ccu_jax.methods import saliency as curvature
from ccu_jax.methods.full_model import (
    chance_loss,
    forward_both,
    paired_batches,
    train_all_modules,
    unaugmented,
)
from ccu_jax.methods.optimizers import parameter_group
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.reference import make_task_loss, train_classifier
from ccu_jax.models import VISUAL
from ccu_jax.train.program import Program
from ccu_jax.train.step import flatten


def finetune(problem: Problem) -> Program:
    """Train on, with the retain set only."""
    return train_classifier(
        problem, problem.params, problem.method_config, problem.sets.retain
    )


def l1_sparse(problem: Problem) -> Program:
    """Train on with the retain set, weights pulled to zero (Jia et al. 2023).

    `CE(retain) + sparsity * (1 - step / steps) * |params|_1`.
    """
    section = problem.method_config
    retain = problem.sets.retain
    steps = problem.count_steps(section.epochs, section.batch, retain)
    task = reference.make_augmented_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        size = sum(jnp.abs(x).sum() for x in jax.tree.leaves(params))
        left = jnp.maximum(1 - step / frozen["steps"], 0)
        total = task(params, batch["rows"])
        if frozen["c"].is_active("l1_weight"):
            total += frozen["c"].l1_weight * left * size
        return total, {}

    plan = {"rows": problem.plan_batches(retain, section.batch, steps, "rows")}
    return train_all_modules(problem, loss, plan, frozen={"steps": np.float32(steps)})


def capped_loss(problem: Problem, out, rows, ceiling):
    """Loss of the unlearn set, each row's cut off: an ascent has no bound of its own.

    The ceiling is in units of the loss of guessing.
    """
    most, total = ceiling * chance_loss(problem), 0.0
    for view in VISUAL:
        each = objectives.cross_entropy_rows(
            getattr(out, view), rows["labels"], multi_label=problem.multi_label
        )
        total += objectives.mean(jnp.minimum(each, most), rows["has_image"])
    return total


def gradient_ascent(problem: Problem) -> Program:
    """Ascend on the unlearn set and do nothing else (Golatkar et al. 2020)."""
    section, sets = problem.method_config, problem.sets
    steps = problem.count_steps(section.epochs, section.unlearn_batch, sets.unlearn)

    def loss(params, frozen, aux, batch, step):
        rows = unaugmented(batch["unlearn"])
        out = problem.model.apply(params, rows)
        return -capped_loss(problem, out, rows, frozen["c"].loss_cap), {}

    rows = problem.plan_batches(sets.unlearn, section.unlearn_batch, steps, "unlearn")
    return train_all_modules(problem, loss, {"unlearn": rows})


def neggrad_plus(problem: Problem) -> Program:
    """Descend on the retain set, ascend on the unlearn set (Kurmanji et al. 2023).

    `keep * CE(retain) - (1 - keep) * CE(unlearn)`, the latter in the views that see the
    picture.
    """
    judge = make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        c = frozen["c"]
        out_r, retain, out_u, unlearn = forward_both(problem, params, batch)
        keep = judge(out_r, retain)
        forget = capped_loss(problem, out_u, unlearn, c.loss_cap)
        return c.retain_weight * keep - (1 - c.retain_weight) * forget, {
            "forget": forget
        }

    return train_all_modules(
        problem, loss, paired_batches(problem, problem.method_config.epochs)
    )


def random_label(problem: Problem) -> Program:
    """Fit the unlearn set to wrong labels, the retain set to its own (Graves 2021).

    `CE(retain) + unlearn_weight * CE(unlearn, wrong)`. With `saliency_fraction`
    below 1 it is SalUn (Fan et al. 2024): only that share of all
    weights moves, those with the largest gradient of the unlearn set's loss.
    """
    judge, section = make_task_loss(problem), problem.method_config
    plan = paired_batches(problem, section.epochs)
    optimizer, numbers = None, ()
    if section.saliency_fraction < 1:
        slope = curvature.mean_gradient(problem, problem.sets.unlearn)
        numbers = {
            "mask": flatten(
                parameter_group, top_fraction_mask(slope, section.saliency_fraction)
            )[0]
        }
        train = problem.config.train
        optimizer = optax.chain(
            optimizers.make_optimizer(train), optimizers.mask_updates()
        )

    def loss(params, frozen, aux, batch, step):
        out_r, retain, out_u, unlearn = forward_both(problem, params, batch)
        total = judge(out_r, retain)
        for view in VISUAL:
            total += frozen["c"].unlearn_weight * objectives.cross_entropy(
                getattr(out_u, view),
                unlearn["wrong"],
                unlearn["has_image"],
                multi_label=problem.multi_label,
            )
        return total, {}

    program = train_all_modules(
        problem, loss, plan, optimizer=optimizer, optimizer_inputs=numbers
    )
    wrong = problem.executor.replicate(wrong_labels(problem))
    return program._replace(table={**problem.table, "wrong": wrong})


def top_fraction_mask(tree, share: float):
    """1.0 for the share of all entries with the largest size, 0.0 for the others.

    Entries that are zero are none of the largest, even if the share has room for them.
    """
    sizes = [np.abs(x).ravel() for x in jax.device_get(jax.tree.leaves(tree))]
    least = np.quantile(np.concatenate(sizes), 1 - share)
    least = max(least, np.finfo(np.float32).tiny)
    return jax.tree.map(lambda x: (jnp.abs(x) >= least).astype(jnp.float32), tree)


def wrong_labels(problem: Problem) -> np.ndarray:
    """Labels `[N, K]` of which those of the unlearn set are wrong, at random.

    A single label becomes any other one. Several become those of a random row of the
    retain set: sets of labels stay such as there are.
    """
    labels = np.array(problem.table["labels"])
    rng, rows = problem.make_rng("labels"), problem.sets.unlearn
    if problem.multi_label:
        labels[rows] = labels[rng.choice(problem.sets.retain, len(rows))]
        return labels
    classes = labels.shape[1]
    true = labels[rows].argmax(1)
    other = (true + rng.integers(1, classes, len(rows))) % classes
    labels[rows] = np.eye(classes, dtype=labels.dtype)[other]
    return labels

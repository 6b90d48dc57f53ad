"""Unlearning methods from the literature that train all modules with the task loss.

Only images have to be unlearned: terms that undo learning act in the views that see the
image (`VISUAL`), and the retain set's loss preserves the text view.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.methods import all_modules, optimizers, reference, saliency
from ccu_jax.methods.problem import Problem
from ccu_jax.models import VISUAL, Outputs
from ccu_jax.train.program import Program
from ccu_jax.train.step import flatten


def finetune(problem: Problem) -> Program:
    """Fine-tunes on the retain set."""
    config, retain = problem.method_config, problem.sets.retain
    return reference.train_classifier(problem, problem.original, config, retain)


def l1_sparse(problem: Problem) -> Program:
    """l1-sparse (Jia et al. 2023): fine-tunes with a decaying L1 penalty.

    CE(retain) + l1_weight * (1 - step / steps) * |params|_1
    """
    config, retain = problem.method_config, problem.sets.retain
    steps = problem.count_steps(config.epochs, config.batch, retain)
    task_loss = reference.make_augmented_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        hp = frozen["hp"]
        l1_norm = sum(jnp.abs(x).sum() for x in jax.tree.leaves(params))
        decay = jnp.maximum(1 - step / frozen["steps"], 0)
        total = task_loss(params, batch["rows"])
        if hp.is_active("l1_weight"):
            total += hp.l1_weight * decay * l1_norm
        return total, {}

    plan = {"rows": problem.plan_batches(retain, config.batch, steps, "rows")}
    return all_modules.train_all_modules(
        problem, loss, plan, frozen={"steps": np.float32(steps)}
    )


def gradient_ascent(problem: Problem) -> Program:
    """Gradient ascent (Golatkar et al. 2020): maximizes the unlearn set's loss.

    -sum_{view in VISUAL} min(CE(unlearn), cap)
    """
    config, sets = problem.method_config, problem.sets
    steps = problem.count_steps(config.epochs, config.unlearn_batch, sets.unlearn)

    def loss(params, frozen, aux, batch, step):
        rows = all_modules.unaugmented(batch["unlearn"])
        outputs = problem.model.apply(params, rows)
        return -capped_loss(problem, outputs, rows, frozen["hp"].loss_cap), {}

    rows = problem.plan_batches(sets.unlearn, config.unlearn_batch, steps, "unlearn")
    return all_modules.train_all_modules(problem, loss, {"unlearn": rows})


def capped_loss(
    problem: Problem, outputs: Outputs, rows: dict[str, jax.Array], cap: Any
) -> jax.Array:
    """Returns the visual views' cross-entropy, each row's bounded for an ascent.

    The bound is `cap` times the chance loss.
    """
    max_loss, total = cap * all_modules.chance_loss(problem), jnp.zeros(())
    for view in VISUAL:
        loss_B = objectives.cross_entropy_rows(
            getattr(outputs, view), rows["labels"], multi_label=problem.multi_label
        )
        total += objectives.mean(jnp.minimum(loss_B, max_loss), rows["has_image"])
    return total


def neggrad_plus(problem: Problem) -> Program:
    """NegGrad+ (Kurmanji et al. 2023): descends on retain, ascends on unlearn rows.

        retain_weight * CE(retain) - (1 - retain_weight) * CE(unlearn)

    The loss of the unlearn set is that of `gradient_ascent`.
    """
    task_loss = reference.make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        hp = frozen["hp"]
        out_r, retain, out_u, unlearn = all_modules.forward_both(problem, params, batch)
        retain_loss = task_loss(out_r, retain)
        unlearn_loss = capped_loss(problem, out_u, unlearn, hp.loss_cap)
        total = hp.retain_weight * retain_loss - (1 - hp.retain_weight) * unlearn_loss
        return total, {"forget": unlearn_loss}

    plan = all_modules.paired_batches(problem, problem.method_config.epochs)
    return all_modules.train_all_modules(problem, loss, plan)


def random_label(problem: Problem) -> Program:
    """Random labels (Graves et al. 2021) and SalUn (Fan et al. 2024).

        CE(retain) + unlearn_weight * sum_{view in VISUAL} CE(unlearn, random labels)

    SalUn is the case of `saliency_fraction` below 1: it trains only that fraction of
    the parameters, those with the largest gradient of the unlearn set's loss.
    """
    config, train = problem.method_config, problem.train_config
    task_loss = reference.make_task_loss(problem)
    optimizer, more_inputs = None, None
    if config.saliency_fraction < 1:
        gradient = saliency.mean_gradient(problem, problem.sets.unlearn)
        mask = top_fraction_mask(gradient, config.saliency_fraction)
        more_inputs = {"mask": flatten(optimizers.parameter_group, mask)[0]}
        optimizer = optax.chain(
            optimizers.make_optimizer(train), optimizers.mask_updates()
        )

    def loss(params, frozen, aux, batch, step):
        out_r, retain, out_u, unlearn = all_modules.forward_both(problem, params, batch)
        total = task_loss(out_r, retain)
        for view in VISUAL:
            total += frozen["hp"].unlearn_weight * objectives.cross_entropy(
                getattr(out_u, view),
                unlearn["wrong"],
                unlearn["has_image"],
                multi_label=problem.multi_label,
            )
        return total, {}

    program = all_modules.train_all_modules(
        problem,
        loss,
        all_modules.paired_batches(problem, config.epochs),
        optimizer=optimizer,
        more_inputs=more_inputs,
    )
    wrong = problem.executor.replicate(draw_wrong_labels(problem))
    return program._replace(table={**problem.table, "wrong": wrong})


def top_fraction_mask(tree: Any, fraction: float) -> Any:
    """Returns 1.0 for the fraction of all entries with the largest size, else 0.0.

    Zeros are never selected, even if the fraction is not reached without them.
    """
    sizes = [np.abs(x).ravel() for x in jax.device_get(jax.tree.leaves(tree))]
    threshold = np.quantile(np.concatenate(sizes), 1 - fraction)
    threshold = max(threshold, np.finfo(np.float32).tiny)
    return jax.tree.map(lambda x: (jnp.abs(x) >= threshold).astype(jnp.float32), tree)


def draw_wrong_labels(problem: Problem) -> np.ndarray:
    """Returns labels `[N, K]` in which those of the unlearn set are wrong, at random.

    A single label becomes another class. Multiple labels become those of a random
    retain row, so that label sets stay realistic.
    """
    labels = np.array(problem.table["labels"])
    rng, rows = problem.make_rng("labels"), problem.sets.unlearn
    if problem.multi_label:
        labels[rows] = labels[rng.choice(problem.sets.retain, len(rows))]
        return labels
    num_classes = labels.shape[1]
    true = labels[rows].argmax(1)
    other = (true + rng.integers(1, num_classes, len(rows))) % num_classes
    labels[rows] = np.eye(num_classes, dtype=labels.dtype)[other]
    return labels

"""Unlearning methods that select parameters by their gradients on the unlearn set.

Gradients are those of the cross-entropy in the views that see the image (`VISUAL`).
Random labels are in this module because SalUn trains selected parameters with them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.data.batches import plan_single_pass
from ccu_jax.distributed.device_tables import device_columns, gather_rows, send_rows
from ccu_jax.distributed.executors import AXIS
from ccu_jax.methods import optimizers, programs
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.reference import make_task_loss
from ccu_jax.models import Params
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program
from ccu_jax.train.step import flatten

# Number of rows whose gradients are in memory at once, on all devices together.
CHUNK_ROWS = 32


def mean_gradient(problem: Problem, rows: np.ndarray) -> Params:
    """Returns the gradient of the original's mean loss on `rows`."""
    return _average_over_rows(problem, rows, squared=False)


def fisher_diagonal(problem: Problem, rows: np.ndarray) -> Params:
    """Returns the empirical Fisher diagonal: the mean squared gradient on `rows`."""
    return _average_over_rows(problem, rows, squared=True)


def _average_over_rows(problem, rows, squared):
    """Returns the mean over `rows` of the original's gradients, or of their squares."""
    executor, table, params = problem.executor, problem.table, problem.original
    compiled = problem.forward.compile_cached(
        f"gradients squared={squared}",
        _make_accumulate_fn(problem.model, problem.multi_label, squared),
    )
    static_inputs = (params, device_columns(table))
    batch = -(-CHUNK_ROWS // executor.num_devices) * executor.num_devices
    total = executor.replicate(jax.tree.map(jnp.zeros_like, params))
    for chunk, is_counted in zip(*plan_single_pass(rows, batch), strict=True):
        inputs = send_rows(executor, table, chunk)
        inputs["weight"] = executor.shard(is_counted.astype(np.float32))
        total, _ = compiled(total, static_inputs, inputs)
    return jax.tree.map(lambda x: x / len(rows), total)


def _make_accumulate_fn(model, multi_label, squared):
    """Returns a per-device function that adds the gradients of a chunk to a sum.

    It must not capture the problem, because its executable outlives the problem.
    """

    def row_loss(params, row):
        rows = jax.tree.map(lambda x: x[None], row)
        outputs = model.apply(params, rows)
        loss = sum(programs.visual_losses(outputs, rows["labels"], multi_label))
        return (loss * rows["weight"] * rows["has_image"])[0]

    def chunk_loss(params, rows):
        return jax.vmap(row_loss, (None, 0))(params, rows).sum()

    def accumulate(state, static_inputs, inputs):
        params, columns = static_inputs
        rows = gather_rows(columns, inputs)
        # Makes the parameters device-varying: shard_map would sum the gradient of
        # replicated parameters over the devices, and psum below would do so again.
        device = jax.lax.axis_index(AXIS)
        params = jax.tree.map(lambda x: x + (0 * device).astype(x.dtype), params)
        if squared:
            gradients = jax.vmap(jax.grad(row_loss), (None, 0))(params, rows)
            total = jax.tree.map(lambda x: (x * x).sum(0), gradients)
        else:
            total = jax.grad(chunk_loss)(params, rows)
        total = jax.tree.map(jnp.add, state, jax.lax.psum(total, AXIS))
        return total, jnp.zeros(())

    return accumulate


def random_label(problem: Problem) -> Program:
    """Random labels (Graves et al. 2021) and SalUn (Fan et al. 2024).

        CE(retain) + unlearn_weight * sum_{view in VISUAL} CE(unlearn, random labels)

    SalUn has a `saliency_fraction` below 1: it trains only that fraction of the
    parameters, those with the largest gradients of the unlearn set's loss.
    """
    config, train = problem.method_config, problem.config.train
    task_loss = make_task_loss(problem)
    optimizer, more_inputs = optimizers.make_optimizer(train), {}
    if config.saliency_fraction < 1:
        gradient = mean_gradient(problem, problem.sets.unlearn)
        mask = top_fraction_mask(gradient, config.saliency_fraction)
        more_inputs = {"mask": flatten(optimizers.parameter_group, mask)[0]}
        optimizer = optax.chain(optimizer, optimizers.mask_updates())

    def loss(params, frozen, aux, batch, step):
        out_r, retain, out_u, unlearn = programs.forward_both(problem, params, batch)
        total = task_loss(out_r, retain)
        losses = programs.visual_losses(out_u, unlearn["wrong"], problem.multi_label)
        for loss_B in losses:
            unlearn_loss = objectives.mean(loss_B, unlearn["has_image"])
            total += frozen["hp"].unlearn_weight * unlearn_loss
        return total, {}

    plan = programs.plan_paired_batches(problem)
    program = programs.make_program(
        problem, loss, plan, optimizer=optimizer, more_inputs=more_inputs
    )
    wrong = problem.executor.replicate(draw_wrong_labels(problem))
    return program._replace(table={**problem.table, "wrong": wrong})


def top_fraction_mask(tree: Any, fraction: float) -> Any:
    """Returns a pytree with 1.0 for the `fraction` of entries of largest magnitude.

    All other entries are 0.0. Zeros are never selected, so fewer entries may be 1.0.
    """
    magnitudes = [np.abs(x).ravel() for x in jax.device_get(jax.tree.leaves(tree))]
    threshold = np.quantile(np.concatenate(magnitudes), 1 - fraction)
    threshold = max(threshold, np.finfo(np.float32).tiny)
    return jax.tree.map(lambda x: (jnp.abs(x) >= threshold).astype(jnp.float32), tree)


def draw_wrong_labels(problem: Problem) -> np.ndarray:
    """Returns labels `[N, K]` with random wrong labels for the unlearn set.

    A single label is replaced by another class, multiple labels by those of a random
    retain row, so that label sets are realistic.
    """
    labels = np.array(problem.table["labels"])
    rng, rows = problem.make_rng("labels"), problem.sets.unlearn
    if problem.multi_label:
        labels[rows] = labels[rng.choice(problem.sets.retain, len(rows))]
        return labels
    num_classes = labels.shape[1]
    true_class = labels[rows].argmax(1)
    shift = rng.integers(1, num_classes, len(rows))
    wrong_class = (true_class + shift) % num_classes
    labels[rows] = np.eye(num_classes, dtype=labels.dtype)[wrong_class]
    return labels


def ssd(problem: Problem) -> Program:
    """SSD (Foster et al. 2024): selective synaptic dampening, a training-free method.

    With F_u and F_D the Fisher diagonals on the unlearn set and on all training rows,
    each parameter with `F_u > alpha * F_D` is multiplied by
    `min(lambda * F_D / F_u, 1)`.
    """
    config, sets = problem.method_config, problem.sets
    rows = np.concatenate([sets.retain, sets.unlearn])
    rows = problem.sample_rows(rows, config.max_rows, "all rows")
    params = _dampen(
        problem.original,
        fisher_diagonal(problem, sets.unlearn),
        fisher_diagonal(problem, rows),
        np.float32(config.alpha),
        np.float32(config.lambda_),
    )
    return Program(params=params, frozen=(), loss=None)


@jax.jit
def _dampen(params, fisher_u, fisher_all, alpha, lambda_):
    def dampen(x, f_u, f_all):
        factor = jnp.minimum(lambda_ * f_all / jnp.maximum(f_u, 1e-30), 1.0)
        return jnp.where(f_u > alpha * f_all, x * factor, x)

    return jax.tree.map(dampen, params, fisher_u, fisher_all)


def sfron(problem: Problem) -> Program:
    """SFR-on (Huang et al. 2024): alternates masked ascent and repair steps.

    A cycle is one ascent step on the unlearn set and `repair_steps` steps on the retain
    set, followed by a Lookahead update with `slow_fraction` (`optimizers.lookahead`).
    With F_u and F_r the Fisher diagonals on the unlearn and retain sets, ascent steps
    train only parameters with `F_u >= fisher_threshold * F_r`, and minimize

        -(1 - step / steps) * sum_{view in VISUAL} mean(weight * min(CE, 2 chance_loss))

    Rows that are still recognized weigh more: weight = CE^-focal_exponent / its mean.
    """
    config, train = problem.method_config, problem.config.train
    rows, is_ascent = _plan_sfron(problem)
    task_loss = make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        hp = frozen["hp"]
        rows = augment(batch["rows"], batch["rows"]["key"], train)
        outputs = problem.model.apply(params, rows, keys=rows["key"])
        decay = jnp.maximum(1 - step / frozen["steps"], 0)
        unlearn_loss = _focal_loss(problem, hp, outputs, rows)
        return jnp.where(
            frozen["is_ascent"][step], -decay * unlearn_loss, task_loss(outputs, rows)
        ), {}

    return programs.make_program(
        problem,
        loss,
        {"rows": rows},
        optimizer=optax.chain(
            # Masked twice, because the momentum of repair steps would otherwise move
            # masked parameters in ascent steps.
            optimizers.mask_updates(),
            optimizers.make_optimizer(train),
            optimizers.mask_updates(),
            optimizers.lookahead(),
        ),
        frozen={"is_ascent": is_ascent, "steps": np.float32(len(rows))},
        more_inputs={
            "mask": flatten(optimizers.parameter_group, _salient_mask(problem))[0],
            "is_ascent": is_ascent,
            "slow_fraction": np.float32(config.slow_fraction),
            "period": np.int32(1 + config.repair_steps),
        },
    )


def _plan_sfron(problem):
    """Returns the plan `[steps, batch]` and padded flags that mark ascent steps."""
    config, sets = problem.method_config, problem.sets
    num_cycles = problem.count_steps(config.epochs, config.batch, sets.unlearn)
    period = 1 + config.repair_steps
    is_ascent = np.arange(num_cycles * period) % period == 0
    rows = np.empty((len(is_ascent), config.batch), np.int32)
    rows[is_ascent] = problem.plan_batches(
        sets.unlearn, config.batch, num_cycles, "unlearn"
    )
    rows[~is_ascent] = problem.plan_batches(
        sets.retain, config.batch, num_cycles * config.repair_steps, "retain"
    )
    return rows, programs.pad_flags(is_ascent)


def _salient_mask(problem) -> Any:
    """Returns SFR-on's mask: 1.0 where F_u >= fisher_threshold * F_r, else 0.0."""
    config, sets = problem.method_config, problem.sets
    retain = problem.sample_rows(sets.retain, config.max_rows, "fisher")
    return _threshold_ratio(
        fisher_diagonal(problem, sets.unlearn),
        fisher_diagonal(problem, retain),
        np.float32(config.fisher_threshold),
    )


@jax.jit
def _threshold_ratio(fisher_u, fisher_r, threshold):
    return jax.tree.map(
        lambda f_u, f_r: (f_u >= threshold * f_r).astype(jnp.float32),
        fisher_u,
        fisher_r,
    )


def _focal_loss(problem, hp, outputs, rows):
    """Returns the unlearn loss of `sfron` without the negative sign and the decay."""
    total, max_loss = jnp.zeros(()), 2 * programs.chance_loss(problem)
    losses = programs.visual_losses(outputs, rows["labels"], problem.multi_label)
    for loss_B in losses:
        fixed_B = jax.lax.stop_gradient(jnp.maximum(loss_B, 1e-2))
        weight_B = fixed_B**-hp.focal_exponent
        mean_weight = objectives.mean(weight_B, rows["image_weight"])
        weight_B = weight_B / jnp.maximum(mean_weight, 1e-9)
        loss_B = jnp.minimum(loss_B, max_loss)
        total += objectives.mean(weight_B * loss_B, rows["image_weight"])
    return total

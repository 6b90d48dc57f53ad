"""Unlearning methods that select parameters by their gradients on the unlearn set.

Gradients are those of the cross-entropy in the views that see the image (`VISUAL`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.config import Train
from ccu_jax.data.batches import plan_single_pass
from ccu_jax.distributed.device_tables import device_columns, gather_rows, send_rows
from ccu_jax.distributed.executors import AXIS
from ccu_jax.methods import all_modules, optimizers
from ccu_jax.methods.cached_features import padded_size
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.reference import make_task_loss
from ccu_jax.models import VISUAL, Params
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program
from ccu_jax.train.step import flatten

# Rows whose gradients are in memory at once, over all devices.
CHUNK_ROWS = 32


def mean_gradient(problem: Problem, rows: np.ndarray) -> Params:
    """Returns the gradient of the mean loss of the original on some rows."""
    return _average_over_rows(problem, rows, squared=False)


def fisher_diagonal(problem: Problem, rows: np.ndarray) -> Params:
    """Returns the diagonal of the empirical Fisher: the mean of squared gradients."""
    return _average_over_rows(problem, rows, squared=True)


def _average_over_rows(problem, rows, squared):
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

    It must not refer to the problem, which its executable outlives.
    """

    def row_loss(params, row):
        rows = jax.tree.map(lambda x: x[None], row)
        outputs = model.apply(params, rows)
        loss = sum(
            objectives.cross_entropy_rows(
                getattr(outputs, view), rows["labels"], multi_label=multi_label
            )
            for view in VISUAL
        )
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


def ssd(problem: Problem) -> Program:
    """Selective synaptic dampening, SSD (Foster et al. 2024), without training.

    With F_u and F_D the diagonals of the Fisher on the unlearn set and on all training
    rows, each parameter with `F_u > alpha * F_D` is multiplied by
    `min(lambda * F_D / F_u, 1)`.
    """
    config, sets = problem.method_config, problem.sets
    rows = np.concatenate([sets.retain, sets.unlearn])
    if config.max_rows and len(rows) > config.max_rows:
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
    """SFR-on (Huang et al. 2024).

    A cycle is one ascent step on the unlearn set and `repair_steps` steps on the retain
    set; after it the slow weights move the fraction `slow_fraction` of the way (see
    `optimizers.lookahead`). With F_u and F_r the diagonals of the Fisher on the unlearn
    set and the retain set, ascent steps train only parameters with
    `F_u >= fisher_threshold * F_r`, and minimize

        -(1 - step / steps) * sum_{view in VISUAL} mean(weight * min(CE, 2 chance loss))

    Rows that are still known count more: `weight` is CE^-focal_exponent, divided by its
    mean.
    """
    config, train = problem.method_config, problem.train_config
    rows, is_ascent = _plan_sfron(problem)
    mask = _mask_salient(problem)
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

    # Padded to one of few sizes, so that requests share an executable.
    padding = padded_size(len(is_ascent), 1) - len(is_ascent)
    is_ascent = jnp.asarray(np.pad(is_ascent, (0, padding)))
    return all_modules.train_all_modules(
        problem,
        loss,
        {"rows": rows},
        optimizer=_sfron_optimizer(train),
        frozen={"is_ascent": is_ascent, "steps": np.float32(len(rows))},
        more_inputs={
            "mask": flatten(optimizers.parameter_group, mask)[0],
            "is_ascent": is_ascent,
            "slow_fraction": np.float32(config.slow_fraction),
            "period": np.int32(1 + config.repair_steps),
        },
    )


def _sfron_optimizer(train: Train) -> optax.GradientTransformation:
    return optax.chain(
        # Masked twice, or the momentum of repair steps would move masked parameters in
        # ascent steps.
        optimizers.mask_updates(only_ascent_steps=True),
        optimizers.make_optimizer(train),
        optimizers.mask_updates(only_ascent_steps=True),
        optimizers.lookahead(),
    )


def _plan_sfron(problem):
    """Returns the rows of each step `[steps, batch]` and whether it is an ascent."""
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
    return rows, is_ascent


def _mask_salient(problem) -> Any:
    """Returns 1.0 for parameters whose Fisher is large on the unlearn set, else 0.0."""
    config, sets = problem.method_config, problem.sets
    retain = sets.retain
    if config.max_rows and len(retain) > config.max_rows:
        retain = problem.sample_rows(retain, config.max_rows, "fisher")
    return _at_least(
        fisher_diagonal(problem, sets.unlearn),
        fisher_diagonal(problem, retain),
        np.float32(config.fisher_threshold),
    )


@jax.jit
def _at_least(fisher_u, fisher_r, threshold):
    return jax.tree.map(
        lambda f_u, f_r: (f_u >= threshold * f_r).astype(jnp.float32),
        fisher_u,
        fisher_r,
    )


def _focal_loss(problem, hp, outputs, rows):
    """Returns SFR-on's loss of the unlearn set, as in `sfron`."""
    total, max_loss = jnp.zeros(()), 2 * all_modules.chance_loss(problem)
    for view in VISUAL:
        loss_B = objectives.cross_entropy_rows(
            getattr(outputs, view), rows["labels"], multi_label=problem.multi_label
        )
        fixed_B = jax.lax.stop_gradient(jnp.maximum(loss_B, 1e-2))
        if hp.is_active("focal_exponent"):
            weight_B = fixed_B**-hp.focal_exponent
        else:
            weight_B = jnp.ones_like(fixed_B)
        mean_weight = objectives.mean(weight_B, rows["image_weight"])
        weight_B = weight_B / jnp.maximum(mean_weight, 1e-9)
        loss_B = jnp.minimum(loss_B, max_loss)
        total += objectives.mean(weight_B * loss_B, rows["image_weight"])
    return total

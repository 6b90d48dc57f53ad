"""Unlearning methods that look at gradients first: which weights hold the unlearn set.

Gradients are of the loss in the views that see the picture.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.data.batches import plan_single_pass
from ccu_jax.distributed.device_tables import device_columns, gather_rows, send_rows
from ccu_jax.distributed.executors import AXIS
from ccu_jax.methods import optimizers, reference
from ccu_jax.methods.cached_features import padded_size
from ccu_jax.methods.full_model import chance_loss, train_all_modules
from ccu_jax.methods.optimizers import lookahead, mask_updates
from ccu_jax.methods.problem import Problem
from ccu_jax.models import VISUAL
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program
from ccu_jax.train.step import flatten

# Rows whose gradients are held at once, on all devices together.
CHUNK = 32


def mean_gradient(problem: Problem, rows):
    """Gradient of the mean loss of some rows."""
    return _pass(problem, rows, squared=False)


def fisher_diagonal(problem: Problem, rows):
    """Mean of the squared gradients of each row's loss: the diagonal of the Fisher."""
    return _pass(problem, rows, squared=True)


def _pass(problem, rows, squared):
    # The compiled pass outlives the problem: of that it holds no more than this.
    model, kind = problem.model, {"multi_label": problem.multi_label}

    def loss(params, row):
        one = jax.tree.map(lambda x: x[None], row)
        out = model.apply(params, one)
        each = sum(
            objectives.cross_entropy_rows(getattr(out, view), one["labels"], **kind)
            for view in VISUAL
        )
        return (each * one["weight"] * one["has_image"])[0]

    def fn(state, resident, index):
        params, table = resident
        rows = gather_rows(table, index)
        # Each device takes gradients of its own rows: where parameters are known to be
        # the same everywhere, their gradient would be summed over the devices.
        mine = jax.lax.axis_index(AXIS)
        params = jax.tree.map(lambda x: x + (0 * mine).astype(x.dtype), params)
        if squared:
            each = jax.vmap(jax.grad(loss), (None, 0))(params, rows)
            total = jax.tree.map(lambda x: (x * x).sum(0), each)
        else:
            every = lambda params: jax.vmap(loss, (None, 0))(params, rows).sum()  # noqa: E731
            total = jax.grad(every)(params)
        total = jax.tree.map(jnp.add, state, jax.lax.psum(total, AXIS))
        return total, jnp.zeros(())

    executor, table = problem.executor, problem.table
    compiled = problem.forward.compile_cached(f"gradients squared={squared}", fn)
    resident = (problem.params, device_columns(table))
    batch = -(-CHUNK // executor.num_devices) * executor.num_devices
    total = executor.replicate(jax.tree.map(jnp.zeros_like, problem.params))
    for rows_of_step, counts in zip(*plan_single_pass(rows, batch), strict=True):
        share = send_rows(executor, table, rows_of_step)
        share["weight"] = executor.shard(counts.astype(np.float32))
        total, _ = compiled(total, resident, share)
    return jax.tree.map(lambda x: x / len(rows), total)


def ssd(problem: Problem) -> Program:
    """Selective synaptic dampening, without a training step (Foster et al. 2024).

    With F_u and F_D the diagonals of the Fisher on the unlearn set and on all training
    rows, each weight with `F_u > select * F_D` is multiplied by
    `min(dampen * F_D / F_u, 1)`.
    """
    section, sets = problem.method_config, problem.sets
    every = np.concatenate([sets.retain, sets.unlearn])
    if section.max_rows and len(every) > section.max_rows:
        every = problem.sample_rows(every, section.max_rows, "all rows")
    of_unlearn, of_all = (
        fisher_diagonal(problem, sets.unlearn),
        fisher_diagonal(problem, every),
    )
    params = _dampen(
        problem.params,
        of_unlearn,
        of_all,
        np.float32(section.alpha),
        np.float32(section.lambda_),
    )
    return Program(params=params, frozen=(), loss=None)


@jax.jit
def _dampen(params, of_unlearn, of_all, select, dampen):
    def one(x, u, d):
        factor = jnp.minimum(dampen * d / jnp.maximum(u, 1e-30), 1.0)
        return jnp.where(u > select * d, x * factor, x)

    return jax.tree.map(one, params, of_unlearn, of_all)


def sfron(problem: Problem) -> Program:
    """Forget a step, repair some steps, keep a share of the way (Huang et al. 2024).

    SFR-on: one ascent on the unlearn set, in the weights where its Fisher is at least
    `fisher_threshold` times the retain set's, rows that are still known counting more
    (weights `loss^-focal_exponent`, decaying to the end); then `repair_steps` steps on
    the retain set; of where that has led, the slow weights go the share
    `slow_fraction`.
    """
    section, sets, train = problem.method_config, problem.sets, problem.config.train
    multi_label = problem.multi_label
    rows, push = _sfron_plan(problem)
    retain = sets.retain
    if section.max_rows and len(retain) > section.max_rows:
        retain = problem.sample_rows(retain, section.max_rows, "fisher")
    mask = _fisher_ratio_mask(
        fisher_diagonal(problem, sets.unlearn),
        fisher_diagonal(problem, retain),
        np.float32(section.fisher_threshold),
    )
    judge = reference.make_task_loss(problem)

    def loss(params, frozen, aux, batch, step):
        c, pushing = frozen["c"], frozen["push"][step]
        given = augment(batch["rows"], batch["rows"]["key"], train)
        out = problem.model.apply(params, given, keys=given["key"])
        left = jnp.maximum(1 - step / frozen["steps"], 0)
        forget, most = 0.0, 2 * chance_loss(problem)
        for view in VISUAL:
            each = objectives.cross_entropy_rows(
                getattr(out, view), given["labels"], multi_label=multi_label
            )
            known = jax.lax.stop_gradient(jnp.maximum(each, 1e-2))
            weight = (
                known**-c.focal_exponent
                if c.is_active("focal_exponent")
                else jnp.ones_like(known)
            )
            usual = objectives.mean(weight, given["image_weight"])
            weight = weight / jnp.maximum(usual, 1e-9)
            each = jnp.minimum(each, most)
            forget += objectives.mean(weight * each, given["image_weight"])
        return jnp.where(pushing, -left * forget, judge(out, given)), {}

    # Of one of few lengths, so that other sets need no other program.
    push = np.pad(push, (0, padded_size(len(push), 1) - len(push)))
    return train_all_modules(
        problem,
        loss,
        {"rows": rows},
        optimizer=optax.chain(
            # In front as well: else shut weights would follow a push by its momentum.
            mask_updates(only_ascent_steps=True),
            optimizers.make_optimizer(train),
            mask_updates(only_ascent_steps=True),
            lookahead(),
        ),
        frozen={"push": jnp.asarray(push), "steps": np.float32(len(rows))},
        optimizer_inputs={
            "mask": flatten(optimizers.parameter_group, mask)[0],
            "is_ascent": jnp.asarray(push),
            "slow_fraction": np.float32(section.slow_fraction),
            "period": np.int32(1 + section.repair_steps),
        },
    )


def _sfron_plan(problem):
    """Rows of each step, and which steps push away: `[steps, batch]`, `[steps]`."""
    section, sets = problem.method_config, problem.sets
    cycles = problem.count_steps(section.epochs, section.batch, sets.unlearn)
    push = (
        np.arange(cycles * (1 + section.repair_steps)) % (1 + section.repair_steps) == 0
    )
    rows = np.empty((len(push), section.batch), np.int32)
    rows[push] = problem.plan_batches(sets.unlearn, section.batch, cycles, "unlearn")
    repairs = cycles * section.repair_steps
    rows[~push] = problem.plan_batches(sets.retain, section.batch, repairs, "retain")
    return rows, push


@jax.jit
def _fisher_ratio_mask(of_unlearn, of_retain, select):
    def one(u, r):
        return (u >= select * r).astype(jnp.float32)

    return jax.tree.map(one, of_unlearn, of_retain)

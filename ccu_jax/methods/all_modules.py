"""Building blocks of methods that train all modules of the original on images."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.methods.cached_features import concat_parts, padded_size
from ccu_jax.methods.optimizers import make_optimizer, optimizer_inputs, parameter_group
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.stopping import with_stop_rule
from ccu_jax.models import VISUAL, Outputs, Params
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program

Rows = dict[str, jax.Array]


def train_all_modules(
    problem: Problem,
    loss: Callable,
    plan: dict[str, np.ndarray],
    *,
    optimizer: optax.GradientTransformation | None = None,
    frozen: Mapping[str, Any] = {},
    more_inputs: Mapping[str, Any] = {},
) -> Program:
    """Returns a program that trains all modules, starting from the original.

    It has the stop rule if the method's configuration has `stop`. The optimizer is by
    default the one of training. `frozen` and `more_inputs` are added to the program's
    `frozen`, which holds the hyperparameters `hp`, and `optimizer_inputs`.
    """
    config, train = problem.method_config, problem.train_config
    num_steps = len(next(iter(plan.values())))
    program = Program(
        params=problem.original,
        frozen={"hp": problem.hyperparameters, **frozen},
        loss=loss,
        optimizer=optimizer or make_optimizer(train),
        optimizer_inputs={
            **optimizer_inputs(config.learning_rate, num_steps, train),
            **more_inputs,
        },
        group=parameter_group,
        table=problem.table,
        plan=plan,
    )
    has_stop_rule = getattr(config, "stop", False)
    return with_stop_rule(problem, program) if has_stop_rule else program


def paired_batches(problem: Problem) -> dict[str, np.ndarray]:
    """Plans a retain and an unlearn batch per step, for epochs over the retain set."""
    config, sets = problem.method_config, problem.sets
    retain = problem.plan_epochs(sets.retain, config.batch, config.epochs, "retain")
    unlearn = problem.plan_batches(
        sets.unlearn, config.unlearn_batch, len(retain), "unlearn"
    )
    return {"retain": retain, "unlearn": unlearn}


def pad_flags(flags: np.ndarray) -> jax.Array:
    """Pads flags of steps to one of few sizes, so that requests share an executable.

    The padding covers the steps that `stopping.with_rewind` appends.
    """
    padding = padded_size(len(flags) + 32, 1) - len(flags)
    return jnp.asarray(np.pad(flags, (0, padding)))


def forward_both(
    problem: Problem, params: Params, batch: Mapping[str, Rows]
) -> tuple[Outputs, Rows, Outputs, Rows]:
    """Runs the model on the retain and the unlearn rows of a batch in one pass.

    Retain rows are augmented and have dropout, as in training; unlearn rows do not.
    Returns outputs and rows of the retain set, then those of the unlearn set.
    """
    retain = augment(batch["retain"], batch["retain"]["key"], problem.train_config)
    unlearn = unaugmented(batch["unlearn"])
    parts = {"retain": retain, "unlearn": unlearn}
    rows, split_parts = concat_parts(parts, dropout_part="retain")
    outputs = split_parts(
        problem.model.apply(
            params, rows, keys=rows["key"], use_dropout=rows["use_dropout"]
        )
    )
    return outputs["retain"], retain, outputs["unlearn"], unlearn


def unaugmented(rows: Rows) -> Rows:
    """Scales images to floats in [0, 1] like `augment`, and changes nothing else."""
    return {**rows, "image": rows["image"] / 255.0}


def visual_losses(
    outputs: Outputs, labels: jax.Array, multi_label: bool
) -> list[jax.Array]:
    """Returns the cross-entropy `[B]` of rows in each of the views `VISUAL`."""
    return [
        objectives.cross_entropy_rows(
            getattr(outputs, view), labels, multi_label=multi_label
        )
        for view in VISUAL
    ]


def chance_loss(problem: Problem) -> float:
    """Returns the cross-entropy of a uniform prediction."""
    num_classes = np.shape(problem.table["labels"])[1]
    if problem.multi_label:
        return objectives.MULTI_LABEL_SCALE * float(np.log(2))
    return float(np.log(num_classes))

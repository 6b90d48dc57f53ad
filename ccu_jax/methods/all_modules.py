"""Building blocks of methods that train all modules of the original on images."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.methods.cached_features import concat_parts
from ccu_jax.methods.hyperparameter_pytree import Hyperparameters
from ccu_jax.methods.optimizers import make_optimizer, optimizer_inputs, parameter_group
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.stopping import with_stop_rule
from ccu_jax.models import Outputs, Params
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program

Rows = dict[str, jax.Array]


def train_all_modules(
    problem: Problem,
    loss: Callable,
    plan: dict[str, np.ndarray],
    *,
    optimizer: optax.GradientTransformation | None = None,
    frozen: Mapping[str, Any] | None = None,
    more_inputs: Mapping[str, Any] | None = None,
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
        frozen={"hp": Hyperparameters.from_config(config), **(frozen or {})},
        loss=loss,
        optimizer=optimizer or make_optimizer(train),
        optimizer_inputs={
            **optimizer_inputs(config.learning_rate, num_steps, train),
            **(more_inputs or {}),
        },
        group=parameter_group,
        table=problem.table,
        plan=plan,
    )
    return (
        with_stop_rule(problem, program) if getattr(config, "stop", False) else program
    )


def paired_batches(problem: Problem, epochs: float) -> dict[str, np.ndarray]:
    """Plans a retain and an unlearn batch per step, for epochs over the retain set."""
    config, sets = problem.method_config, problem.sets
    num_steps = problem.count_steps(epochs, config.batch, sets.retain)
    return {
        "retain": problem.plan_batches(sets.retain, config.batch, num_steps, "retain"),
        "unlearn": problem.plan_batches(
            sets.unlearn, config.unlearn_batch, num_steps, "unlearn"
        ),
    }


def forward_both(
    problem: Problem, params: Params, batch: Mapping[str, Rows]
) -> tuple[Outputs, Rows, Outputs, Rows]:
    """Runs the model on the retain and the unlearn rows of a batch in one pass.

    Retain rows are augmented and have dropout, as in training; unlearn rows do not.
    Returns outputs and rows of the retain set, then those of the unlearn set.
    """
    retain = batch["retain"]
    retain = augment(retain, retain["key"], problem.train_config)
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


def chance_loss(problem: Problem) -> float:
    """Returns the cross-entropy of a uniform prediction."""
    num_classes = np.shape(problem.table["labels"])[1]
    if problem.multi_label:
        return objectives.MULTI_LABEL_SCALE * float(np.log(2))
    return float(np.log(num_classes))

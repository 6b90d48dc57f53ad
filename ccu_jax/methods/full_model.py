"""What methods that train every part of the original have in common."""

import numpy as np

from ccu_jax import objectives
from ccu_jax.methods import optimizers
from ccu_jax.methods.cached_features import concat_parts
from ccu_jax.methods.hyperparameters import Hyperparameters
from ccu_jax.methods.optimizers import parameter_group
from ccu_jax.methods.problem import Problem
from ccu_jax.methods.stopping import with_stop_rule
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program


def train_all_modules(
    problem: Problem, loss, plan, *, optimizer=None, frozen=(), optimizer_inputs=()
):
    """A program that trains every part of the original.

    Args:
        problem: what the method was given.
        loss: of `Program`; its `frozen["c"]` is the method's section.
        plan: of `Program`.
        optimizer: of `Program`; that of training by default.
        frozen: more of it by name, as are `optimizer_inputs`.
    """
    section, train = problem.method_config, problem.config.train
    steps = len(next(iter(plan.values())))
    program = Program(
        params=problem.params,
        frozen={"c": Hyperparameters.from_section(section), **dict(frozen)},
        loss=loss,
        optimizer=optimizer or optimizers.make_optimizer(train),
        optimizer_inputs=optimizers.optimizer_inputs(
            section.learning_rate, steps, train
        )
        | dict(optimizer_inputs),
        group=parameter_group,
        table=problem.table,
        plan=plan,
    )
    stops = getattr(section, "stop", False)
    return with_stop_rule(problem, program) if stops else program


def paired_batches(problem: Problem, epochs: float):
    """Rows of both sets for so many passes over the retain set."""
    section, sets = problem.method_config, problem.sets
    batch = {"retain": section.batch, "unlearn": section.unlearn_batch}
    steps = problem.count_steps(epochs, section.batch, sets.retain)
    return {
        name: problem.plan_batches(getattr(sets, name), size, steps, name)
        for name, size in batch.items()
    }


def forward_both(problem: Problem, params, batch):
    """Outputs and rows of both sets, in one pass.

    Retain rows are changed at random and have dropout, as in training; those of the
    unlearn set are taken as they are.
    """
    retain = batch["retain"]
    retain = augment(retain, retain["key"], problem.config.train)
    unlearn = unaugmented(batch["unlearn"])
    every, cut = concat_parts({"retain": retain, "unlearn": unlearn}, drop="retain")
    model = problem.model
    out = cut(model.apply(params, every, keys=every["key"], drop=every["drop"]))
    return out["retain"], retain, out["unlearn"], unlearn


def unaugmented(rows):
    """Rows with pictures as floats, otherwise as they are."""
    return {**rows, "image": rows["image"] / 255.0}


def chance_loss(problem: Problem) -> float:
    """The loss of a model that knows nothing."""
    num_classes = problem.table["labels"].shape[1]
    if problem.multi_label:
        return objectives.MULTI_LABEL_SCALE * float(np.log(2))
    return float(np.log(num_classes))

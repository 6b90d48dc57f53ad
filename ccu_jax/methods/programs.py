"""Building blocks of methods: programs, batch plans, forward passes and losses."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.methods import optimizers
from ccu_jax.methods.cached_features import compute_padded_size
from ccu_jax.methods.problem import Hyperparameters, Problem, Rows
from ccu_jax.methods.stopping import add_stop_rule
from ccu_jax.models import VISUAL, Model, Outputs, Params
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program


def make_program(
    problem: Problem,
    loss: Callable,
    plan: dict[str, np.ndarray],
    *,
    modules: tuple[str, ...] = (),
    frozen: Mapping[str, Any] = {},
    sharded_tables: Mapping[str, Any] = {},
    optimizer: optax.GradientTransformation | None = None,
    more_inputs: Mapping[str, Any] = {},
) -> Program:
    """Returns a program that trains modules of the original.

    It has the stop rule if the method's configuration sets `stop`.

    Args:
        loss, plan: see `Program`.
        modules: names of the trained modules, by default all.
        frozen: added to the program's `frozen`, which has the hyperparameters `hp` and
            the parameters `modules` of the modules that are not trained.
        sharded_tables: see `Program`; without them, batches are rows of the data set.
        optimizer: by default that of training from scratch, `make_optimizer`.
        more_inputs: added to the learning rates in `optimizer_inputs`.
    """
    config, train = problem.method_config, problem.config.train
    original = problem.original
    modules = modules or tuple(original)
    num_steps = len(next(iter(plan.values())))
    rates = optimizers.make_optimizer_inputs(config.learning_rate, num_steps, train)
    program = Program(
        params={name: original[name] for name in modules},
        frozen={
            "hp": Hyperparameters.from_config(config),
            "modules": {n: x for n, x in original.items() if n not in modules},
            **frozen,
        },
        loss=loss,
        optimizer=optimizer or optimizers.make_optimizer(train),
        optimizer_inputs={**rates, **more_inputs},
        group=optimizers.parameter_group,
        table={} if sharded_tables else problem.table,
        sharded_tables=dict(sharded_tables),
        plan=plan,
    )
    has_stop_rule = getattr(config, "stop", False)
    return add_stop_rule(problem, program) if has_stop_rule else program


def plan_paired_batches(problem: Problem) -> dict[str, np.ndarray]:
    """Plans a retain and an unlearn batch per step, in epochs over the retain set."""
    config, sets = problem.method_config, problem.sets
    retain = problem.plan_epochs(sets.retain, config.batch, "retain")
    unlearn = problem.plan_batches(
        sets.unlearn, config.unlearn_batch, len(retain), "unlearn"
    )
    return {"retain": retain, "unlearn": unlearn}


def pad_flags(flags: np.ndarray) -> jax.Array:
    """Pads per-step flags to one of a few lengths, so that runs share an executable.

    The padding covers the steps that `stopping.add_rewind` appends.
    """
    padding = compute_padded_size(len(flags) + 32, 1) - len(flags)
    return jnp.asarray(np.pad(flags, (0, padding)))


def forward_parts(
    model: Model,
    params: Params,
    parts: Mapping[str, Rows],
    dropout_parts: tuple[str, ...] = (),
) -> dict[str, Outputs]:
    """Runs the model on all parts of a batch in one pass; returns outputs by part.

    One pass is faster to compile and to run than a pass per part. Columns that are not
    in all parts are ignored. Dropout applies to `dropout_parts` only.
    """
    shared = set.intersection(*(set(rows) for rows in parts.values()))
    columns = {
        # Sorted, because all processes must compile the same program.
        name: jnp.concatenate([rows[name] for rows in parts.values()])
        for name in sorted(shared)
    }
    sizes = [len(rows["labels"]) for rows in parts.values()]
    options = {}
    if dropout_parts:
        use_dropout = np.repeat([name in dropout_parts for name in parts], sizes)
        options = {"keys": columns["key"], "use_dropout": use_dropout}
    outputs = model.apply(params, columns, **options)
    ends = np.cumsum([0, *sizes])
    return {
        name: jax.tree.map(lambda x, a=a, b=b: x[a:b], outputs)
        for name, a, b in zip(parts, ends[:-1], ends[1:], strict=True)
    }


def forward_both(
    problem: Problem, params: Params, batch: Mapping[str, Rows]
) -> tuple[Outputs, Rows, Outputs, Rows]:
    """Runs the model on the retain and the unlearn rows of a batch in one pass.

    Augmentation and dropout apply to the retain rows only. Returns retain outputs,
    retain rows, unlearn outputs and unlearn rows.
    """
    retain = augment(batch["retain"], batch["retain"]["key"], problem.config.train)
    unlearn = scale_images(batch["unlearn"])
    parts = {"retain": retain, "unlearn": unlearn}
    outputs = forward_parts(problem.model, params, parts, dropout_parts=("retain",))
    return outputs["retain"], retain, outputs["unlearn"], unlearn


def scale_images(rows: Rows) -> Rows:
    """Scales images to floats in [0, 1], as `augment` does, without augmentation."""
    return {**rows, "image": rows["image"] / 255.0}


def visual_losses(
    outputs: Outputs, labels: jax.Array, multi_label: bool
) -> list[jax.Array]:
    """Returns the per-row cross-entropy `[B]` for each view in `VISUAL`."""
    loss = objectives.cross_entropy_rows
    logits = [getattr(outputs, view) for view in VISUAL]
    return [loss(x, labels, multi_label=multi_label) for x in logits]


def chance_loss(problem: Problem) -> float:
    """Returns the cross-entropy of a uniform prediction."""
    if problem.multi_label:
        return objectives.MULTI_LABEL_SCALE * float(np.log(2))
    return float(np.log(np.shape(problem.table["labels"])[1]))

"""The program of a method, which the training loop runs, and the training state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ccu_jax.distributed.device_tables import Table
from ccu_jax.models import Params


class Program(NamedTuple):
    """A method as data: parameters, loss, optimizer, and the batches of all steps.

    Attributes:
        params: the modules of the classifier that are trained, by name.
        frozen: a pytree of constant inputs of the loss.
        loss: `loss(params, frozen, aux, batch, step) -> (scalar, metrics)`, or None if
            `params` are already the result. `batch` maps each part of `plan` to rows of
            its table, with a random `key` per row. Scalars are means over all devices.
        optimizer: an Optax transformation. It updates one flat vector per `group`
            instead of a pytree of arrays, which is faster to compile and to run.
        optimizer_inputs: arrays passed to each `optimizer.update` as `inputs`, such as
            learning rates and masks; other values do not recompile the steps.
        group: maps the name of a module to the name of its parameter group.
        table: columns for the parts of a batch without a sharded table.
        sharded_tables: tables from `Executor.shard_tree`, by part of a batch.
        plan: row numbers of each part of a batch, int32 `[steps, batch]`.
        aux: state of the method other than parameters, such as targets.
        refresh: `refresh(params, frozen, aux, sharded_tables) -> aux`, per-device; runs
            before every `refresh_every`-th step, starting with step 0.
        refresh_every: steps between two refreshes.
        stop: `stop(aux) -> bool`; no further step runs once it returns True.
        result: `result(params, aux) -> params`, or None for the final parameters.
    """

    params: Params
    frozen: Any
    loss: Callable | None
    optimizer: optax.GradientTransformation = optax.identity()
    optimizer_inputs: Any = ()
    group: Callable[[str], str] = lambda module: "all"
    table: Table = {}  # noqa: RUF012  never mutated, like those below
    sharded_tables: dict[str, Any] = {}  # noqa: RUF012
    plan: dict[str, np.ndarray] = {}  # noqa: RUF012
    aux: Any = ()
    refresh: Callable | None = None
    refresh_every: int = 1
    stop: Callable | None = None
    result: Callable | None = None

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return len(next(iter(self.plan.values()))) if self.plan else 0

    @property
    def is_fully_sharded(self) -> bool:
        """Whether all parts of a batch are gathered from sharded device tables."""
        return bool(self.plan) and set(self.plan) <= set(self.sharded_tables)


class State(NamedTuple):
    """The training state, replicated on every device."""

    step: jax.Array
    params: Params
    opt: Any
    aux: Any
    key: jax.Array

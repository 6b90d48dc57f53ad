"""The program of a method, which the training loop runs, and the training state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ccu_jax.distributed.device_tables import Table
from ccu_jax.models import Params


class Program(NamedTuple):
    """A method as data: parameters, loss, optimizer, and the rows of every step.

    Attributes:
        params: the modules of the classifier that are trained, by name.
        frozen: all other inputs of the loss, which no step changes.
        loss: `loss(params, frozen, aux, batch, step) -> (scalar, metrics)`, or None if
            `params` are already the result. `batch` maps each part of `plan` to rows of
            its table, with a random key per row (`key`). Scalars are means over all
            devices.
        optimizer: an Optax transformation. It sees one flat vector per `group` instead
            of a tree of arrays, which is faster to compile and to run.
        optimizer_inputs: arrays passed to each `optimizer.update` as `inputs`: learning
            rates and masks are data, so that other values need no other executable.
        group: maps the name of a module to the name of its group.
        table: columns for the parts of a batch that have no sharded table.
        sharded_tables: tables by part of a batch, from `Executor.shard_tree`; each
            device holds its shard only.
        plan: for each part of a batch the row numbers, int32 `[steps, batch]`.
        aux: state of the method besides parameters, such as targets.
        refresh: `refresh(params, frozen, aux, sharded_tables) -> aux`, per-device, runs
            before every `refresh_every`-th step, starting with the first.
        refresh_every: steps between two refreshes.
        stop: `stop(aux) -> bool`; after the first True no further step is made.
        result: `result(params, aux) -> params`, or None if the result are the
            parameters after the last step.
    """

    params: Params
    frozen: Any
    loss: Callable | None
    optimizer: optax.GradientTransformation = optax.identity()
    optimizer_inputs: Any = ()
    group: Callable[[str], str] = lambda module: "all"
    table: Table = {}  # noqa: RUF012  never changed, like those below
    sharded_tables: dict[str, Any] = {}  # noqa: RUF012
    plan: dict[str, np.ndarray] = {}  # noqa: RUF012
    aux: Any = ()
    refresh: Callable | None = None
    refresh_every: int = 1
    stop: Callable | None = None
    result: Callable | None = None

    @property
    def steps(self) -> int:
        """Number of updates."""
        return len(next(iter(self.plan.values()))) if self.plan else 0

    @property
    def is_fully_sharded(self) -> bool:
        """Whether every part of a batch has a sharded table."""
        return bool(self.plan) and set(self.plan) <= set(self.sharded_tables)


class State(NamedTuple):
    """The training state, replicated on every device."""

    step: jax.Array
    params: Params
    opt: Any
    aux: Any
    key: jax.Array

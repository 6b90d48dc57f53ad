"""The context that all stages of a run share, and the problem of one seed."""

import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from ccu_jax.config import Config
from ccu_jax.data import Dataset, corruptions
from ccu_jax.distributed.device_tables import Table
from ccu_jax.distributed.executors import Executor
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import Problem
from ccu_jax.models import TAIL, Model
from ccu_jax.runs.progress import Reporter
from ccu_jax.train.loop import Loop
from ccu_jax.unlearn_sets.splits import Sets


class RunContext(NamedTuple):
    """What all stages of a run share."""

    config: Config
    workdir: pathlib.Path
    reporter: Reporter
    executor: Executor
    data: Dataset  # after corruption
    corruptions: dict[str, Any]  # what each one changed, see `corruptions.apply`
    model: Model
    forward: Forward
    loop: Loop
    table: Table


def build_problem(ctx: RunContext, seed: int, sets: Sets) -> Problem:
    """Returns the problem of a seed, still without an original and its features."""
    return Problem(
        config=ctx.config,
        model=ctx.model,
        forward=ctx.forward,
        executor=ctx.executor,
        table=ctx.table,
        sets=sets,
        multi_label=ctx.data.multi_label,
        params=None,
        seed=seed,
        stream_positions=corruptions.stream_positions(
            ctx.data, ctx.config.corruptions.order
        ),
    )


def evaluation_table(problem: Problem, trained: Iterable[str]) -> Table:
    """Returns the table on which to evaluate a model that was made from the original.

    These are the stored features if the modules in which the model differs from the
    original (`trained`) do not change them, else the rows themselves.
    """
    if problem.store is None or not set(trained) <= set(TAIL):
        return problem.table
    return problem.store.as_table(problem.table)

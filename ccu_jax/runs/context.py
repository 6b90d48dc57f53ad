"""The context of a run: everything its stages share, and the problem of a seed."""

import pathlib
from typing import Any, NamedTuple

from ccu_jax.config import Config
from ccu_jax.data import Dataset, corruptions
from ccu_jax.distributed.executors import Executor
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import Problem
from ccu_jax.models import Model
from ccu_jax.runs.progress import Reporter
from ccu_jax.train.loop import Loop
from ccu_jax.unlearn_sets.splits import Sets


class RunContext(NamedTuple):
    """Everything that the stages of a run share."""

    config: Config
    workdir: pathlib.Path
    reporter: Reporter
    executor: Executor
    data: Dataset
    corruptions: dict[str, Any]  # what they came to
    model: Model
    forward: Forward
    loop: Loop
    table: dict[str, Any]


def build_problem(ctx: RunContext, seed: int, sets: Sets) -> Problem:
    """What the methods of a seed are given, without an original."""
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
        stream_positions=corruptions.stream_positions(ctx.data, ctx.config.corruptions.order),
    )

"""How long a run will take, told before it begins.

A guess: from an original that has been trained here, else from one look at some rows.
"""

import time
from typing import NamedTuple

import jax
import numpy as np

from ccu_jax.distributed.hosts import wait_until_visible
from ccu_jax.methods import REFERENCES
from ccu_jax.runs import results as rows
from ccu_jax.runs.context import RunContext

# A step there and back, beside a pass there; of training's time, what a method takes
# that trains every part, and one that works on stored features.
_STEP, _WHOLE, _TAIL = 3.5, 0.1, 0.02
COMPILE_S = 8.0  # for each method, once, and for all seeds
_ROWS = 256


class Pace(NamedTuple):
    """Seconds on this machine.

    `training`: of one model from scratch; `look`: for a pass over all rows.
    """

    training: float
    look: float

    def method(self, name: str) -> float:
        """Seconds for a method and its evaluation, without compiling."""
        if name in REFERENCES:
            return self.training + self.look
        tail = name.startswith(("ccu", "cf_", "eu_")) and not name.endswith("_full")
        return (_TAIL if tail else _WHOLE) * self.training + self.look


def measure_pace(ctx: RunContext) -> Pace:
    """What is known of this machine.

    Where no original has been trained yet, some rows are looked at with a model that
    has learned nothing, some times; else no picture is.

    Args:
        ctx: the context of the run.
    """
    for seed in ctx.config.seeds:
        path = rows.result_path(ctx.workdir, seed, "original")
        if wait_until_visible(path):
            seconds = rows.load_result(path)["seconds"]
            return Pace(seconds["unlearn"], seconds["evaluate"])
    params = ctx.executor.replicate(ctx.model.init(jax.random.key(0)))
    count = len(ctx.data.id)
    some = np.arange(min(count, _ROWS))
    seconds = []
    for _ in range(4):  # the first compiles, and any may come at a busy moment
        began = time.perf_counter()
        ctx.forward.encode(params, ctx.table, some)
        seconds.append(time.perf_counter() - began)
    each = min(seconds) / len(some)
    trained = float((ctx.data.split == "train").sum())
    train = ctx.config.train
    return Pace(_STEP * train.epochs * trained * each, count * each)


def describe_stages(ctx: RunContext, todo: dict[int, list[str]]) -> str:
    """Says how long the methods that are left to do for each seed take, about."""
    known = measure_pace(ctx)
    names = {name for methods in todo.values() for name in methods}
    seconds = COMPILE_S * len(names)
    seconds += sum(known.method(n) for methods in todo.values() for n in methods)
    count = sum(map(len, todo.values()))
    return f"models to make: {count}, {format_estimate(seconds)}"


def describe_variants(
    ctx: RunContext, runs: dict[str, int], apart: bool = False
) -> str:
    """Says how long so many runs of each method take, about.

    Args:
        ctx: of the run.
        runs: of each method.
        apart: whether each is a program of its own.
    """
    known = measure_pace(ctx)
    # What is switched off is another program; other numbers are not.
    seconds = sum(
        (n if apart else 1) * COMPILE_S + n * known.method(name)
        for name, n in runs.items()
    )
    return (
        f"{sum(runs.values())} runs of {len(runs)} methods: {format_estimate(seconds)}"
    )


def format_estimate(seconds: float) -> str:
    """Seconds as a guess in words."""
    if seconds < 90:
        return f"about {max(round(seconds, -1), 10):.0f} s on this machine"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min on this machine"
    return f"about {seconds / 3600:.1f} h on this machine"

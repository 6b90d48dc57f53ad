"""Estimates the duration of a run before it starts.

The estimate is scaled from the time of an original trained in this folder, or otherwise
from the time of a few forward passes.
"""

import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from ccu_jax.distributed.hosts import wait_until_visible
from ccu_jax.methods import REFERENCES
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.results import load_result, result_path

# A training step costs this many forward passes over its rows.
_PASSES_PER_STEP = 3.5
# The time of a method as a fraction of training: of all modules, of the tail alone.
_FULL_MODEL_FRACTION, _TAIL_FRACTION = 0.1, 0.02
COMPILE_S = 8.0  # per method, shared by all seeds
_MAX_ROWS, _NUM_PASSES = 256, 4


class Speed(NamedTuple):
    """The wall times of training and evaluation on this machine."""

    training_s: float  # of one model from scratch
    evaluation_s: float  # one forward pass over all rows

    def method_s(self, name: str) -> float:
        """Returns the seconds for a method and its evaluation, without compilation."""
        if name in REFERENCES:
            return self.training_s + self.evaluation_s
        is_tail = name.startswith(("ccu", "cf_", "eu_")) and not name.endswith("_full")
        fraction = _TAIL_FRACTION if is_tail else _FULL_MODEL_FRACTION
        return fraction * self.training_s + self.evaluation_s


def measure_speed(ctx: RunContext) -> Speed:
    """Reads the wall time of a trained original, or measures forward passes instead."""
    for seed in ctx.config.seeds:
        path = result_path(ctx.workdir, seed, "original")
        if wait_until_visible(path):
            seconds = load_result(path)["seconds"]
            return Speed(seconds["unlearn"], seconds["evaluate"])
    params = ctx.executor.replicate(ctx.model.init(jax.random.key(0)))
    num_rows = len(ctx.data.id)
    rows = np.arange(min(num_rows, _MAX_ROWS))
    times_s = []
    for _ in range(_NUM_PASSES):  # the fastest counts, as the first one compiles
        start_s = time.perf_counter()
        ctx.forward.encode(params, ctx.table, rows)
        times_s.append(time.perf_counter() - start_s)
    row_s = min(times_s) / len(rows)
    trained_rows = ctx.config.train.epochs * float((ctx.data.split == "train").sum())
    return Speed(_PASSES_PER_STEP * trained_rows * row_s, num_rows * row_s)


def describe_runs(
    ctx: RunContext, runs: Mapping[str, int], recompile: bool = False
) -> str:
    """Describes the duration of `runs`, which maps each method to its number of runs.

    With `recompile` every run compiles its own executable, as it does if a loss is
    disabled.
    """
    speed = measure_speed(ctx)
    seconds = sum(
        (count if recompile else 1) * COMPILE_S + count * speed.method_s(name)
        for name, count in runs.items()
    )
    total = sum(runs.values())
    return f"{total} runs of {len(runs)} methods: {format_forecast(seconds)}"


def format_forecast(seconds: float) -> str:
    """Formats a duration as a rounded estimate: "about 5 min on this machine"."""
    if seconds < 90:
        text = f"{max(round(seconds, -1), 10):.0f} s"
    elif seconds < 5400:
        text = f"{round(seconds / 60)} min"
    else:
        text = f"{seconds / 3600:.1f} h"
    return f"about {text} on this machine"

"""`python -m ccu_jax.benchmarks unlearn`: whole runs of every method and their costs.

Seconds of preparation and of steps, compile time apart, FLOPs, bytes, memory, and
utilization of the device.
"""

import argparse
import functools
import math
import pathlib
import statistics
import tempfile
from typing import Any

import jax
from rich.table import Table

from ccu_jax.benchmarks import costs, problems
from ccu_jax.benchmarks.harness import summarize
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS, Problem
from ccu_jax.runs.progress import NullStage
from ccu_jax.train.loop import Loop

HELP = "whole runs of every method: seconds, FLOPs, bytes, memory, utilization"
# One run of these is long enough to be measured once.
_LONG = ("original", "retrain", "retrain_visual")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add = parser.add_argument
    add("--preset", choices=tuple(problems.PRESETS), default="clipart")
    add("--methods", metavar="A,B", default=",".join(METHODS), help="default all")
    add("--executor", choices=tuple(EXECUTORS), default="pmap")
    add("--windows", metavar="N", type=int, default=5, help="runs of each; default 5")
    add(
        "--epochs",
        metavar="N",
        type=float,
        help="training epochs, instead of the configuration's",
    )


def check_flags(flags: argparse.Namespace) -> None:
    """Raises UserError on flags that cannot be measured."""
    for name in flags.methods.split(","):
        if name not in METHODS:
            raise UserError(
                f"--methods: unknown method {name!r}; choose from {', '.join(METHODS)}"
            )
    if flags.windows < 1:
        raise UserError("--windows: must be at least 1")
    if flags.epochs is not None and not 0 < flags.epochs < math.inf:
        raise UserError("--epochs: must be finite and above 0")


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Runs every method, those on cached features with stored and computed ones."""
    sizes = problems.PRESETS[flags.preset]
    problem = problems.make_problem(sizes, EXECUTORS[flags.executor]())
    if flags.epochs:
        problem = problems.replace_section(problem, "train", epochs=flags.epochs)
    peaks = costs.measure_peaks(problem.config.model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "features"
        store = feature_store.open_or_build(
            path,
            problem.forward,
            problem.original,
            problem.table,
            problem.seed,
            "bench",
            lambda done, total: None,
        )
        problem = problem._replace(store=store)
        runs = []
        for name in flags.methods.split(","):
            is_cached = METHODS[name](problem).is_fully_sharded
            for features in ("computed", "stored") if is_cached else (None,):
                runs.append(
                    measure_method(problem, name, features, flags.windows, peaks)
                )
    sets = {name: len(rows) for name, rows in problem.sets._asdict().items()}
    return {
        "preset": flags.preset,
        "sets": sets,
        "peaks": peaks._asdict(),
        "runs": runs,
    }


def measure_method(
    problem: Problem,
    name: str,
    features: str | None,
    windows: int,
    peaks: costs.Peaks,
) -> dict[str, Any]:
    """Measures runs of one method, and the cost of one of its steps.

    Args:
        problem: with stored features.
        name: the method.
        features: "stored" or "computed"; None for methods that train on images.
        windows: number of runs after a first one that compiles.
        peaks: of the device.
    """
    if features is not None:
        problem = problems.replace_section(problem, "run", features=features)
    # A new Forward and Loop: nothing that other methods compiled is reused.
    batch = problem.config.run.evaluate_batch
    problem = problem._replace(forward=Forward(problem.model, problem.executor, batch))
    loop = Loop(problem.config.run, problem.executor, lambda text: None)
    method = functools.partial(problems.build_program, name)

    def run() -> Any:
        # A folder of its own, or the run would resume from a checkpoint.
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "steps"
            return loop.run(name, method, problem, path, NullStage())

    first = run()
    outcomes = [run() for _ in range(1 if name in _LONG else windows)]
    program = method(problem)
    steps_s = statistics.median(outcome.seconds["steps"] for outcome in outcomes)
    result = {
        "method": name,
        "features": features,
        "steps": first.steps,
        "rows": sum(plan.shape[1] for plan in (program.plan or {}).values()),
        "compile_s": first.seconds["compile"],
        "start_s": statistics.median(o.seconds["start"] for o in outcomes),
        "steps_s": steps_s,
        "seconds": summarize(
            [o.seconds["start"] + o.seconds["steps"] for o in outcomes]
        ),
        "trained": sum(x.size for x in jax.tree.leaves(program.params)),
    }
    if not first.steps:
        return result
    compiled = costs.measure_compiled(program, problem.executor)
    flops = costs.count_flops(program, problem.executor)
    step_s = steps_s / first.steps
    share = flops / problem.executor.num_devices
    return {
        **result,
        "step_s": step_s,
        "flops": flops,
        **compiled,
        **costs.utilization(share, compiled["bytes"], step_s, peaks),
    }


def tables(measured: dict[str, Any]) -> list[Table]:
    """Returns the table of seconds and that of the cost of one step."""
    runs, peaks = measured["runs"], measured["peaks"]
    original = [r["seconds"]["median"] for r in runs if r["method"] == "original"]
    sets = ", ".join(f"{name} {size:,}" for name, size in measured["sets"].items())
    header = ("method", "features", "steps", "start s", "steps s", "total s", "low")
    header += ("high", "% of original", "compile s")
    seconds = Table(*header, title=f"{measured['preset']}: {sets}")
    seconds.caption = (
        "random rows: stop rules are evaluated and ignored; stored features are read "
        "from the page cache"
    )
    header = ("method", "features", "rows", "trained", "ms", "GFLOP", "MB", "MiB")
    steps = Table(*header, "MFU %", "roofline %", title="one step")
    basis = "the data sheet" if peaks["datasheet"] else "the measured peak"
    steps.caption = (
        f"measured peak {peaks['flops'] / 1e9:,.0f} GFLOP/s, "
        f"{peaks['bytes'] / 1e9:,.0f} GB/s; MFU relative to {basis}; FLOPs of the "
        "global batch by XLA's count; MB and MiB (peak memory) on one device"
    )
    for run in runs:
        name, total = (run["method"], run["features"] or ""), run["seconds"]
        percent = f"{100 * total['median'] / original[0]:.3g}" if original else ""
        values = (run["start_s"], run["steps_s"])
        values += tuple(total[key] for key in ("median", "low", "high"))
        row = (f"{value:,.3g}" for value in values)
        seconds.add_row(
            *name, str(run["steps"]), *row, percent, f"{run['compile_s']:,.3g}"
        )
        cells = [
            "" if run.get(key) is None else f"{run[key] * scale:,.3g}"
            for key, scale in (
                ("step_s", 1e3),
                ("flops", 1e-9),
                ("bytes", 1e-6),
                ("memory", 2**-20),
                ("mfu", 100),
                ("roofline", 100),
            )
        ]
        steps.add_row(*name, str(run["rows"]), f"{run['trained']:,}", *cells)
    return [seconds, steps]

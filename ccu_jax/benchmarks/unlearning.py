"""`python -m ccu_jax.benchmarks unlearn` and `compile`: whole runs of the methods.

`unlearn`: seconds before and of the steps, and FLOPs, bytes, memory and utilization of
one step. `compile`: seconds from the start of the command line to the first unlearning
step, with an empty and with a filled compilation cache.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from rich.table import Table

from ccu_jax.benchmarks import costs, harness, problems
from ccu_jax.benchmarks.harness import Column, Command, Progress
from ccu_jax.config.loading import available_configs
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.errors import UserError
from ccu_jax.methods import METHODS, Problem

# Run once, as their runs are long.
_LONG = ("original", "retrain", "retrain_visual")
COMPILED_METHOD = "ccu_plus"
# Compilation depends neither on the number of rows nor on that of epochs.
_SETTINGS = ("train.epochs=1", "data.records=False", "data.sample_rows=600")

# --- unlearn --------------------------------------------------------------------------


def add_unlearn_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `unlearn`."""
    add = functools.partial(harness.add_flag, parser)
    add("--preset", harness.one_of(problems.PRESETS), "clipart")
    add("--methods", harness.list_of(harness.one_of(METHODS)), [*METHODS])
    add("--executor", harness.one_of(EXECUTORS), "pmap")
    add("--windows", harness.at_least(1), 5, "runs of each method")
    help_text = "training epochs, not as configured"
    parser.add_argument("--epochs", type=_positive, help=help_text)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def measure_unlearn(flags: argparse.Namespace) -> dict[str, Any]:
    """Runs every method; those on features with stored and with computed features."""
    spec = problems.PRESETS[flags.preset]
    if flags.epochs:
        spec = problems.replace_section(spec, "train", epochs=flags.epochs)
    executor, store = EXECUTORS[flags.executor](), problems.random_store(spec)
    problem = problems.make_problem(spec, executor, store=store)
    peaks = costs.measure_peaks(problem.config.model.dtype)
    runs = []
    for name in flags.methods:
        uses_features = problems.build_program(name, problem).is_fully_sharded
        for features in ("computed", "stored") if uses_features else (None,):
            runs.append(measure_method(problem, name, features, flags.windows, peaks))
    return {
        "preset": flags.preset,
        "sets": {name: len(rows) for name, rows in problem.sets._asdict().items()},
        "peaks": peaks._asdict(),
        "runs": runs,
    }


def measure_method(
    problem: Problem, name: str, features: str | None, windows: int, peaks: costs.Peaks
) -> dict[str, Any]:
    """Measures runs of a method after one that compiles, and the cost of a step.

    `features` is "stored" or "computed", or None for methods that read images.
    """
    if features is not None:
        problem = problems.replace_section(problem, "run", features=features)
    run = problems.make_run(name, problem)
    first = run()
    seconds = [run().seconds for _ in range(1 if name in _LONG else windows)]
    program = problems.build_program(name, problem)
    steps_s = statistics.median(s["steps"] for s in seconds)
    result = {
        "method": name,
        "features": features,
        "steps": first.steps,
        "rows": sum(plan.shape[1] for plan in (program.plan or {}).values()),
        "trained": sum(x.size for x in jax.tree.leaves(program.params)),
        "compile_s": first.seconds["compile"],
        "start_s": statistics.median(s["start"] for s in seconds),
        "steps_s": steps_s,
        "seconds": harness.summarize([s["start"] + s["steps"] for s in seconds]),
    }
    if not first.steps:
        return result
    compiled = costs.measure_compiled(program, problem.executor)
    flops, step_s = costs.count_flops(program, problem.executor), steps_s / first.steps
    device_flops = flops / problem.executor.num_devices
    usage = costs.utilization(device_flops, compiled["bytes"], step_s, peaks)
    return {**result, "step_s": step_s, "flops": flops, **compiled, **usage}


_NAMES = [Column("method", "method"), Column("features", "features")]
_RUN_COLUMNS = [
    *_NAMES,
    Column("steps", "steps", ","),
    Column("start s", "start_s", ",.3g"),
    Column("steps s", "steps_s", ",.3g"),
    *harness.spread_columns("total s", "seconds", ",.3g"),
    Column("% of original", "of_original", ".3g", 100),
    Column("compile s", "compile_s", ",.3g"),
]
_STEP_COLUMNS = [
    *_NAMES,
    Column("rows", "rows", ","),
    Column("parameters", "trained", ","),
    Column("ms", "step_s", ",.3g", 1e3),
    Column("GFLOP", "flops", ",.3g", 1e-9),
    Column("MB", "bytes", ",.3g", 1e-6),
    Column("MiB", "memory", ",.3g", 2**-20),
    Column("MFU %", "mfu", ".3g", 100),
    Column("roofline %", "roofline", ".3g", 100),
]


def make_unlearn_tables(measured: dict[str, Any]) -> list[Table]:
    """Returns the tables of whole runs and of one step."""
    runs, peaks = measured["runs"], measured["peaks"]
    totals = {run["method"]: run["seconds"]["median"] for run in runs}
    if original := totals.get("original"):
        runs = [{**r, "of_original": r["seconds"]["median"] / original} for r in runs]
    sizes = ", ".join(f"{name} {size:,}" for name, size in measured["sets"].items())
    note = "stop rules are evaluated and ignored; stored features are in memory"
    basis = "of the data sheet" if peaks["datasheet"] else "that was measured"
    step_note = (
        f"measured peaks {peaks['flops'] / 1e9:,.0f} GFLOP/s, "
        f"{peaks['bytes'] / 1e9:,.0f} GB/s; MFU relative to the peak {basis}; rows and "
        "GFLOP of the global batch; MB accessed and peak MiB of one device"
    )
    return [
        harness.make_table(f"{measured['preset']}: {sizes}", _RUN_COLUMNS, runs, note),
        harness.make_table("one step", _STEP_COLUMNS, runs, step_note),
    ]


# --- compile --------------------------------------------------------------------------


def add_compile_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `compile`."""
    names = [*available_configs()]
    harness.add_flag(parser, "--configs", harness.list_of(harness.one_of(names)), names)
    harness.add_flag(parser, "--windows", harness.at_least(1), 3, "warm starts")


def measure_compile(flags: argparse.Namespace) -> dict[str, Any]:
    """Starts every configuration with an empty cache, then with a filled one."""
    rows, total = [], 1 + flags.windows
    for config in flags.configs:
        progress, starts = Progress(config), []
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder) / "run"
            progress("training the original", 0, 1)
            run_command(config, workdir, "original")
            for window in range(total):
                progress("starting", window, total)
                starts.append(measure_start(config, workdir))
        progress("starting", total, total)
        empty, *filled = starts
        median = {key: statistics.median(s[key] for s in filled) for key in empty}
        rows += [
            {"config": config, "cache": "empty", **empty},
            {"config": config, "cache": "filled", **median, "windows": filled},
        ]
    return {"starts": rows}


def measure_start(config: str, workdir: pathlib.Path) -> dict[str, float]:
    """Unlearns with the command line; returns the seconds to its first step and end."""
    start = time.time()
    run_command(config, workdir, f"original,{COMPILED_METHOD}")
    total_s = time.time() - start
    result = workdir / "stages" / f"{COMPILED_METHOD}-0.json"
    clocks = json.loads(result.read_text("utf-8"))["seconds"]
    end_s = result.stat().st_mtime - start
    # The next start unlearns again.
    result.unlink()
    shutil.rmtree(workdir / "checkpoints" / f"{COMPILED_METHOD}-0")
    return {
        # All steps are one call. Includes the few milliseconds of saving the result.
        "first_step_s": end_s - clocks["steps"] - clocks["evaluate"],
        "total_s": total_s,
        "compile_s": clocks["compile"],
        "start_s": clocks["start"],
    }


def run_command(config: str, workdir: pathlib.Path, methods: str) -> None:
    """Runs the command line.

    Raises:
        UserError: the run failed; quotes the end of its stderr.
    """
    command = [sys.executable, "-m", "ccu_jax.launch", "--config", config]
    command += ["--workdir", str(workdir), "--methods", methods]
    for setting in _SETTINGS:
        command += ["--set", setting]
    # Uses the cache beside the working folder, not one that the environment names.
    environment = dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    if process.returncode:
        reason = process.stderr.strip()[-300:]
        raise UserError(f"{config}: the run failed: {reason}")


def make_compile_tables(measured: dict[str, Any]) -> list[Table]:
    """Returns the table of starts."""
    columns = [
        Column("config", "config"),
        Column("cache", "cache"),
        Column("first step", "first_step_s", ".2f"),
        Column("end", "total_s", ".2f"),
        Column("compilation", "compile_s", ".2f"),
        Column("method start", "start_s", ".2f"),
    ]
    title = f"{COMPILED_METHOD}: seconds from the start of the command"
    return [harness.make_table(title, columns, measured["starts"])]


_UNLEARN_HELP = "whole runs of every method: seconds, FLOPs, bytes, memory, utilization"
_COMPILE_HELP = (
    "seconds to the first unlearning step, with and without compiled programs"
)
COMMANDS = {
    "unlearn": Command(
        _UNLEARN_HELP, add_unlearn_flags, measure_unlearn, make_unlearn_tables
    ),
    "compile": Command(
        _COMPILE_HELP, add_compile_flags, measure_compile, make_compile_tables
    ),
}

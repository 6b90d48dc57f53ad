"""`python -m ccu_jax.benchmarks unlearn` and `compile`: end-to-end run times.

`unlearn`: seconds before the first step and of all steps, and the FLOPs, bytes, memory
and utilization of one step. `compile`: seconds from starting the command to the first
unlearning step, with an empty and with a filled compilation cache.
"""

import argparse
import contextlib
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

from ccu_jax.benchmarks import costs, harness, problems
from ccu_jax.benchmarks.harness import Column, Command, Flag, Measurements, Progress
from ccu_jax.config.loading import available_configs
from ccu_jax.distributed.executors import pmap
from ccu_jax.errors import UserError
from ccu_jax.methods import METHODS, Problem

_LONG = ("original", "retrain", "retrain_visual")  # methods that run once
COMPILED_METHOD = "ccu_plus"
# Compilation does not depend on the number of rows or epochs.
_SETTINGS = "--set train.epochs=1 --set data.records=False --set data.sample_rows=600"

_NAMES = [Column("method", "method"), Column("features", "features")]
_RUN_COLUMNS = [
    *_NAMES,
    Column("steps", "steps", ","),
    Column("start s", "start_s", ",.3g"),
    Column("steps s", "steps_s", ",.3g"),
    Column("total s", "seconds", ",.3g"),
    Column("% of original", "of_original", ".3g", 100),
    Column("compile s", "compile_s", ",.3g"),
]
_STEP_COLUMNS = [
    *_NAMES,
    Column("ms", "step_s", ",.3g", 1e3),
    Column("GFLOP", "flops", ",.3g", 1e-9),
    Column("MB accessed", "bytes", ",.3g", 1e-6),
    Column("peak MiB", "memory", ",.3g", 2**-20),
    Column("MFU %", "mfu", ".3g", 100),
    Column("roofline %", "roofline", ".3g", 100),
]
_PEAK_COLUMNS = [
    Column("peak GFLOP/s", "flops", ",.0f", 1e-9),
    Column("peak GB/s", "bytes", ",.0f", 1e-9),
    Column("data sheet, GFLOP/s", "datasheet", ",.0f", 1e-9),
]


def measure_unlearn(flags: argparse.Namespace) -> list[Measurements]:
    """Measures every selected method; some with both stored and computed features."""
    spec = problems.PRESETS[flags.preset]
    if flags.epochs:
        spec = problems.replace_section(spec, "train", epochs=flags.epochs)
    problem = problems.make_problem(spec, pmap())
    peaks = costs.measure_peaks(problem.config.model.dtype)
    runs = []
    for name in flags.methods:
        uses_features = problems.build_program(name, problem).is_fully_sharded
        for features in ("computed", "stored") if uses_features else (None,):
            runs.append(measure_method(problem, name, features, flags.windows, peaks))
    totals = {run["method"]: run["seconds"]["median"] for run in runs}
    for run in runs if "original" in totals else ():
        run["of_original"] = run["seconds"]["median"] / totals["original"]
    sizes = (f"{name} {len(rows):,}" for name, rows in problem.sets._asdict().items())
    title = f"{flags.preset}: {', '.join(sizes)}"
    note = "stop rules are evaluated but ignored; stored features are in memory"
    step_note = (
        "MFU: relative to the data sheet peak, or the measured peak if not listed; "
        "GFLOP per global batch; bytes per device"
    )
    return [
        Measurements("runs", title, _RUN_COLUMNS, runs, note),
        Measurements("steps", "one step", _STEP_COLUMNS, runs, step_note),
        Measurements("peaks", "one device", _PEAK_COLUMNS, [peaks._asdict()]),
    ]


def measure_method(
    problem: Problem, name: str, features: str | None, windows: int, peaks: costs.Peaks
) -> dict[str, Any]:
    """Measures runs of a method after a warm-up run, and the cost of one step.

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
    usage = costs.compute_utilization(device_flops, compiled["bytes"], step_s, peaks)
    return {**result, "step_s": step_s, "flops": flops, **compiled, **usage}


def _parse_epochs(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


_START_COLUMNS = [
    Column("config", "config"),
    Column("cache", "cache"),
    Column("first step s", "first_step_s", ".2f"),
    Column("total s", "total_s", ".2f"),
    Column("compile s", "compile_s", ".2f"),
    Column("start s", "start_s", ".2f"),
]


def measure_compile(flags: argparse.Namespace) -> list[Measurements]:
    """Measures the startup of each configuration with an empty and a filled cache."""
    rows, total = [], 1 + flags.windows
    for config in flags.configs:
        progress, starts = Progress(config), []
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder) / "run"
            progress("training the original", 0, 1)
            run_command(config, workdir, "original")
            for window in range(total):
                progress("starting", window, total)
                starts.append(measure_startup(config, workdir))
        progress("starting", total, total)
        empty, *filled = starts
        median = {key: statistics.median(s[key] for s in filled) for key in empty}
        rows += [
            {"config": config, "cache": "empty", **empty},
            {"config": config, "cache": "filled", **median, "windows": filled},
        ]
    title = f"{COMPILED_METHOD}: seconds from the start of the command"
    return [Measurements("starts", title, _START_COLUMNS, rows)]


def measure_startup(config: str, workdir: pathlib.Path) -> dict[str, float]:
    """Runs unlearning as a command; returns the seconds to its first step and exit."""
    start = time.time()
    run_command(config, workdir, f"original,{COMPILED_METHOD}")
    total_s = time.time() - start
    result = workdir / "stages" / f"{COMPILED_METHOD}-0.json"
    clocks = json.loads(result.read_text("utf-8"))["seconds"]
    end_s = result.stat().st_mtime - start
    # Remove the result, so that the next run unlearns again.
    result.unlink()
    shutil.rmtree(workdir / "checkpoints" / f"{COMPILED_METHOD}-0")
    return {
        # Exact because all steps are one call; includes saving the result, a few ms.
        "first_step_s": end_s - clocks["steps"] - clocks["evaluate"],
        "total_s": total_s,
        "compile_s": clocks["compile"],
        "start_s": clocks["start"],
    }


def run_command(config: str, workdir: pathlib.Path, methods: str) -> None:
    """Runs `ccu_jax.launch`; raises UserError with the end of stderr if it fails."""
    argv = [sys.executable, "-m", "ccu_jax.launch", "--config", config]
    argv += ["--workdir", str(workdir), "--methods", methods, *_SETTINGS.split()]
    # Use the cache in the working directory, not one set in the environment.
    env = {k: x for k, x in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    process = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    if process.returncode:
        error = process.stderr.strip()[-300:]
        raise UserError(f"{config}: the command failed: {error}")


COMMANDS = {
    "unlearn": Command(
        "runs of every method: seconds, FLOPs, bytes, memory, utilization",
        [
            problems.PRESET_FLAG,
            harness.names_flag("--methods", METHODS, "", "methods to run"),
            Flag("--epochs", _parse_epochs, None, "replaces the configured epochs"),
        ],
        5,
        measure_unlearn,
    ),
    "compile": Command(
        "seconds to the first unlearning step, with and without compiled programs",
        [harness.names_flag("--configs", available_configs(), "", "configurations")],
        3,
        measure_compile,
    ),
}

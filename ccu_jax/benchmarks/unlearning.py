"""`python -m ccu_jax.benchmarks unlearn`: whole runs of every method, their costs.

The account that papers on unlearning leave out: seconds of start and steps, compiling
apart, FLOPs, bytes, memory, and how well the device is used.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from ccu_jax.benchmarks import costs as bench_cost
from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks import step_count as bench_step_count
from ccu_jax.benchmarks.problems import Quiet
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store as features
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS
from ccu_jax.train.loop import Loop

HELP = "whole runs of every method: seconds, FLOPs, bytes, memory, use of the device"
# Pictures of MM-IMDb's train set, seconds: what an H200 is to reach, without compiling.
_GPU = {"computed": 5.0, "stored": 1.0}


def flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    add = parser.add_argument
    add("--preset", choices=tuple(bench_problem.PRESETS), default="clipart")
    add(
        "--methods",
        metavar="A,B",
        default=",".join(METHODS),
        help="default all; others are compared with `original` where it is among them",
    )
    add("--executor", choices=tuple(EXECUTORS), default="pmap")
    add("--windows", metavar="N", type=int, default=5, help="runs of each; default 5")
    add(
        "--epochs",
        metavar="N",
        type=float,
        help="of training, instead of the configuration's: large models take long",
    )


def check(given: argparse.Namespace) -> None:
    """Refuses what cannot be measured.

    Raises:
        UserError: which flag, and what it may be.
    """
    for name in given.methods.split(","):
        if name not in METHODS:
            raise UserError(f"--methods: {name!r} is none of {', '.join(METHODS)}")
    if given.windows < 1:
        raise UserError("--windows: must be 1 or more")
    if given.epochs is not None and not 0 < given.epochs < math.inf:
        raise UserError("--epochs: must be above 0, and finite")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Runs every method, `windows` times, the features computed and stored."""
    problem = bench_problem.make(bench_problem.PRESETS[given.preset], given.executor)
    config = problem.config
    if given.epochs:
        train = dataclasses.replace(config.train, epochs=given.epochs)
        problem = problem._replace(config=dataclasses.replace(config, train=train))
    peak = bench_cost.peaks(config.model.dtype)
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder) / "features"
        store = features.open_or_build(
            place,
            problem.forward,
            problem.params,
            problem.table,
            problem.seed,
            "bench",
            lambda done, total: None,
        )
        stored = problem._replace(store=store)
        runs = [
            _method(stored, name, kind, given.windows, peak)
            for name in given.methods.split(",")
            for kind in _kinds(name, stored)
        ]
    sets = {name: len(rows) for name, rows in problem.sets._asdict().items()}
    return {"preset": given.preset, "sets": sets, "peak": peak, "runs": runs}


def _kinds(name, problem):
    """Where its features come from, if a method works on such."""
    return ("computed", "stored") if METHODS[name](problem).is_fully_sharded else (None,)


def _method(problem, name, kind, windows, peak):
    if kind is not None:
        run = dataclasses.replace(problem.config.run, features=kind)
        problem = problem._replace(config=dataclasses.replace(problem.config, run=run))
    # Nothing is compiled yet, not even what other methods share with this one.
    batch = problem.config.run.evaluate_batch
    problem = problem._replace(forward=Forward(problem.model, problem.executor, batch))
    # Trained anew, a run is long enough to be measured once.
    windows = windows if name not in ("original", "retrain", "retrain_visual") else 1
    loop = Loop(problem.config.run, problem.executor, lambda text: None)

    def run():
        # A folder of its own: what another run has left there is gone on from.
        with tempfile.TemporaryDirectory() as folder:
            return loop.run(
                name,
                functools.partial(bench_problem.unstopped, name),
                problem,
                pathlib.Path(folder) / "steps",
                Quiet(),
            )

    first = run()
    made = [run() for _ in range(windows)]
    took = [outcome.seconds for outcome in made]
    program = bench_problem.unstopped(name, problem)
    steps_s = float(np.median([s["steps"] for s in took]))
    total = [s["start"] + s["steps"] for s in took]
    return {
        "method": name,
        "features": kind,
        "steps": first.steps,
        "windows": [outcome.steps for outcome in made],
        "rows": sum(plan.shape[1] for plan in (program.plan or {}).values()),
        "compile_s": first.seconds["compile"],
        "start_s": float(np.median([s["start"] for s in took])),
        "steps_s": steps_s,
        "seconds": {
            "low": min(total),
            "median": float(np.median(total)),
            "high": max(total),
        },
        "trained": sum(x.size for x in jax.tree.leaves(program.params)),
        **_per_step(program, problem.executor, first.steps, steps_s, peak),
    }


def _per_step(program, executor, steps, steps_s, peak):
    """What a step costs and how well it uses the device; nothing where none is made."""
    cost, step_s = dict.fromkeys(("flops", "bytes", "memory")), None
    if steps:
        # Whatever is drawn: the same arrays are moved and multiplied.
        cost = bench_cost.of_step(program, executor, jax.random.key(0))
        cost["flops"] = bench_step_count.flops(program, executor)
        step_s = steps_s / steps
    told = {"per_step": {**cost, "ms": 1e3 * step_s if steps else None}}
    return told | bench_cost.judged(cost, step_s, peak)


def targets(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised of a GPU; elsewhere it is not measured."""
    told = []
    on_gpu = measured["peak"]["kind"] == "H200" and measured["preset"] == "vit_b16"
    for run in measured["runs"]:
        if run["method"] == "ccu_plus":
            told.append(
                {
                    "name": f"H200, ViT-B/16: ccu_plus, features {run['features']}",
                    "value": run["seconds"]["median"] if on_gpu else None,
                    "sign": "<=",
                    "bound": _GPU[run["features"]],
                    "unit": "s",
                }
            )
    return told


def tables(measured: dict[str, Any]) -> list[tuple]:
    """The account: seconds first, then what one step costs."""
    runs, sets = measured["runs"], measured["sets"]
    original = [r for r in runs if r["method"] == "original"]
    whole = original[0]["seconds"]["median"] if original else None

    def name(run):
        return run["method"] + (
            f", features {run['features']}" if run["features"] else ""
        )

    seconds = [
        (
            name(run),
            f"{run['steps']}",
            _short(run["start_s"]),
            _short(run["steps_s"]),
            _short(run["seconds"]["median"]),
            f"{_short(run['seconds']['low'])}..{_short(run['seconds']['high'])}",
            _short(100 * run["seconds"]["median"] / whole) if whole else "",
            _short(run["compile_s"]),
        )
        for run in runs
    ]
    costs = [
        (
            name(run),
            f"{run['rows']}",
            f"{run['trained']:,}",
            _scaled(run["per_step"]["ms"], 1),
            _scaled(run["per_step"]["flops"], 1e9),
            _scaled(run["per_step"]["bytes"], 1e6),
            _scaled(run["per_step"]["memory"], 2**20),
            _percent(run["mfu"]),
            _percent(run["roofline"]),
        )
        for run in runs
    ]
    peak = measured["peak"]
    told = ", ".join(f"{name} {count:,}" for name, count in sets.items())
    header = ("", "steps", "start s", "steps s", "both s", "range", "% of original")
    return [
        (
            f"{measured['preset']}: {told}",
            (*header, "compile s"),
            seconds,
            [
                "random rows: stop rules are asked and not obeyed, all steps are made",
                "the store has been read once before, so it lies in the memory of the "
                "system: at a first request its rows come from the disk",
            ],
        ),
        (
            "one step on one device",
            (
                *("", "rows", "trained", "ms", "GFLOP", "MB", "peak MiB"),
                *("MFU %", "roofline %"),
            ),
            costs,
            [
                f"measured peak {peak['flops'] / 1e9:,.0f} GFLOP/s, "
                f"{peak['bytes'] / 1e9:,.0f} GB/s"
                + (
                    f"; MFU of the data sheet's {peak['datasheet'] / 1e12:,.0f} TFLOP/s"
                    if peak["datasheet"]
                    else "; MFU of that peak"
                ),
                "FLOPs by XLA's count of what it is given, bytes of what it has "
                "compiled; caches may hold what it counts as moved, so the roofline "
                "share of small programs may exceed 100 %",
                "peak: arguments, results and temporary values of the compiled steps, "
                "on each device",
            ],
        ),
    ]


def _short(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _scaled(value: float | None, unit: float) -> str:
    return "" if value is None else _short(value / unit)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"

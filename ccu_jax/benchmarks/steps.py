"""`python -m ccu_jax.benchmarks step`: a step of every method, in every way.

One compiled scan against Python loops, executors against each other, JAX against
PyTorch; all that is compared is measured in turn, window by window.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
from typing import Any

import jax
import numpy as np

from ccu_jax.benchmarks import costs as bench_cost
from ccu_jax.benchmarks import prepare as bench_prepare
from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks import step_count as bench_step_count
from ccu_jax.benchmarks import step_tables as bench_step_tables
from ccu_jax.benchmarks import step_ways as ways
from ccu_jax.benchmarks import torch_baseline as bench_torch
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store as features
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS
from ccu_jax.methods.cached_features import build_feature_tables

HELP = "a step of every method: one scan and loops, executors, and PyTorch"
_METHODS = "original,neggrad_plus,scrub,ccu,ccu_plus"
_COMPARED = 64  # rows whose logits are compared
_MOST_ROWS = 1 << 16

tables, targets = bench_step_tables.tables, bench_step_tables.targets


def flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    add = parser.add_argument
    add("--preset", choices=tuple(bench_problem.PRESETS), default="clipart")
    add("--methods", metavar="A,B", default=_METHODS, help=f"default {_METHODS}")
    add(
        "--executors",
        metavar="A,B",
        default=",".join(EXECUTORS),
        help="the first one runs all methods, the others `original` and `ccu_plus`; "
        f"default {','.join(EXECUTORS)}",
    )
    add("--windows", metavar="N", type=int, default=7, help="default 7")
    add(
        "--torch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure PyTorch, where it is installed; default yes",
    )
    add("--batch", metavar="N", type=int, help="rows of a step; default as configured")


def check(given: argparse.Namespace) -> None:
    """Refuses what cannot be measured.

    Raises:
        UserError: which flag, and what it may be.
    """
    for flag, known in (("methods", METHODS), ("executors", EXECUTORS)):
        names = getattr(given, flag).split(",")
        for name in names:
            if name not in known:
                raise UserError(f"--{flag}: {name!r} is none of {', '.join(known)}")
        if len(set(names)) < len(names):
            raise UserError(f"--{flag}: each at most once")
    if given.windows < 1:
        raise UserError("--windows: must be 1 or more")
    if given.batch is not None and not 1 <= given.batch <= _MOST_ROWS:
        raise UserError(f"--batch: must lie between 1 and {_MOST_ROWS}")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """What the flags ask for: see `_method` for what is told of each."""
    sizes = bench_problem.PRESETS[given.preset]
    first, *others = given.executors.split(",")
    problem = _problem(sizes, first, given.batch)
    config, names = problem.config, given.methods.split(",")
    why = bench_torch.missing() if given.torch else "--no-torch"
    notes = [] if why is None else [f"PyTorch: {why}"]
    if len(jax.devices()) > 1:
        notes.append(
            "several devices: no loop that indexes, vmap makes believe on one, and "
            "PyTorch has one"
        )
    told = {
        "settings": {k: v for k, v in vars(given).items() if k != "json"},
        "dtype": config.model.dtype,
        "platform": jax.devices()[0].platform,
        "devices": jax.device_count(),
        "datasheet": bench_cost.advertised(),
        "methods": [],
        "logits_difference": None,
        "notes": notes,
    }
    with tempfile.TemporaryDirectory() as folder:
        folder, process = pathlib.Path(folder), None
        kinds = [name for name in names if name in bench_torch.KINDS]
        if why is None and kinds:
            _hand_over(folder, problem, sizes, kinds)
            process = bench_torch.Torch(folder)
        try:
            if process is not None:
                told["logits_difference"] = _difference(process, problem)
            for name in names:
                found = _method(problem, name, others, given.windows, process, folder)
                if name == "original":
                    rows = found["rows"]
                    by_hand = bench_step_count.training_flops(config, sizes, rows)
                    found["flops_by_hand"] = by_hand
                told["methods"].append(found)
        finally:
            if process is not None:
                process.close()
    if hasattr(os, "getloadavg"):
        told["load_after"] = list(os.getloadavg())
        notes.append(f"load {told['load_after'][0]:.1f} at the end")
    return told


def _problem(sizes, executor, batch):
    """A problem with stored features, and rows of a step as asked for."""
    problem = bench_problem.make(sizes, executor)
    place, rows = problem.executor.replicate, np.arange(sizes.rows)
    fresh = place(features.init_untrained(problem.model, problem.seed))
    columns = features.compute_features(
        problem.forward, problem.params, fresh, problem.table, rows
    )
    store = features.FeatureStore(jax.device_get(columns), np.ones(sizes.rows, bool))
    config = problem.config
    if batch is not None:
        config = bench_problem.with_batches(
            config, lambda field, old: batch if field == "batch" else old
        )
    return problem._replace(store=store, config=config)


def _moved(problem, executor):
    """The same problem under another executor."""
    executor = EXECUTORS[executor]()
    return problem._replace(
        executor=executor,
        forward=Forward(problem.model, executor, problem.config.run.evaluate_batch),
        table=executor.replicate(problem.table),
        params=executor.replicate(problem.params),
    )


def _hand_over(folder, problem, sizes, kinds):
    programs = {}
    for kind in kinds:
        of, rows = problem._replace(method=kind), None
        if kind == "ccu_plus":
            rows = build_feature_tables(
                of, problem.config.ccu_plus.max_retain_rows
            ).rows
        programs[kind] = (METHODS[kind](of), rows)
    shape = {
        "classes": sizes.classes,
        "vocabulary": sizes.vocabulary,
        "image_size": sizes.image_size,
        "text_length": sizes.text_length,
    }
    bench_torch.write(folder, problem, shape, programs)


def _difference(process, problem):
    """The largest difference of any logit or embedding, on the first rows."""
    rows = np.arange(min(_COMPARED, len(problem.table["labels"])))
    mine = problem.forward.outputs(problem.params, problem.table, rows)
    theirs = process.logits(len(rows))
    return max(
        float(np.abs(np.asarray(mine[name]) - x).max()) for name, x in theirs.items()
    )


def _method(problem, name, others, windows, process, folder) -> dict[str, Any]:
    """All that is measured of one method.

    Returns:
        `ways`: seconds of a step in each way, window by window, and of whole runs;
        `outside`: the share that the loop adds; `peak`: FLOPs a second of a large
        product between these windows; `executors`: seconds of a step in the scan by
        executor; `flops` of a step, by the compiler's count; `convolutions` in all that
        was compiled; `threads`: of PyTorch, window by window; `failed`: what PyTorch
        could not do, and why.
    """
    screen = bench_prepare.Screen(name)
    screen("compiling", 0, 1)
    steps = ways.Steps(problem, name)
    run, failed, compiled = steps.ways(folder / "none"), {}, [steps.scan, steps.single]
    run.append(ways.peak(problem.config.model.dtype))
    first = problem.executor.name
    if name in ("original", "ccu_plus"):
        for other in others:
            moved = ways.Steps(_moved(problem, other), name, steps.steps)
            compiled.append(moved.scan)
            run.append(ways.Way(other, lambda m=moved, o=other: {o: m.scanned()[0]}))
    if name == "ccu_plus":
        run.append(ways.whole(steps))
    if process is not None and name in bench_torch.KINDS:
        modes = bench_torch.MODES
        run += [ways.torch(process, steps, mode, failed) for mode in modes]
    screen("compiling", 1, 1)
    found = ways.measure(run, windows, screen)
    counted = bench_cost.counted(steps.single)
    executors = {first: found[ways.SCAN]} | {
        o: found.pop(o) for o in others if o in found
    }
    outside, peak = found.pop(ways.OUTSIDE), found.pop(ways.PEAK)
    threads = {way: found.pop(way) for way in list(found) if way.endswith("threads")}
    return {
        "method": name,
        "tail": steps.tail,
        "steps": steps.steps,
        "rows": sum(plan.shape[1] for plan in steps.program.plan.values()),
        "compile_s": steps.compile_s,
        "ways": {way: _told(windows) for way, windows in found.items()},
        "outside": _told(outside),
        "peak": _told(peak),
        "executors": {of: _told(windows) for of, windows in executors.items()},
        "flops": bench_step_count.flops(steps.program, steps.executor),
        "flops_compiled": counted["flops"],
        "convolutions": sum(
            bench_step_count.convolutions(each.as_text()) for each in compiled
        ),
        "threads": threads,
        "failed": failed,
    }


def _told(windows):
    return {
        "median": statistics.median(windows),
        "low": min(windows),
        "high": max(windows),
        "windows": windows,
    }

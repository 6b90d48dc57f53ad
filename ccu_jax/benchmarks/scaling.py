"""`python -m ccu_jax.benchmarks scale`: how the cost of ccu_plus grows.

`sizes`: runs as sets, images and models grow. `store`: a run on few rows as the feature
store grows.
"""

import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.table import Table

from ccu_jax.benchmarks import harness, problems
from ccu_jax.benchmarks.harness import Column, Command, Progress
from ccu_jax.benchmarks.problems import (
    ProblemSpec,
    make_problem,
    random_store,
    replace_section,
)
from ccu_jax.distributed.executors import EXECUTORS, Executor
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store
from ccu_jax.methods import Problem
from ccu_jax.train.loop import Outcome

HELP = "growth of costs: sets, classes, images, depth, stored rows"
PARTS = ("sizes", "store")
UNLEARN_FRACTIONS = (0.01, 0.03, 0.1, 0.2, 0.3)
RETAIN_SIZES = (1000, 2000, 4000, 7000)
NUM_CLASSES = (2, 10, 100)
IMAGE_SCALES = (0.5, 1.0, 2.0)
DEPTHS = (1, 2, 8)
TRAIN_ROWS = 10_000  # of the sweep over sets
# Sizes of the run on few rows.
STORE_SETS = {"unlearn": 100, "validation": 150, "unseen": 15, "test": 15}
RETAIN_ROWS = 500  # that ccu_plus samples
_IDENTITY = {"checkpoint": "random", "fingerprint": "random rows"}
Rows = list[dict[str, Any]]  # of a table


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add = functools.partial(harness.add_flag, parser)
    add("--preset", harness.one_of(problems.PRESETS), "clipart")
    add("--executor", harness.one_of(("pmap", "shard_map")), "pmap")
    add("--only", harness.list_of(harness.one_of(PARTS)), [*PARTS])
    stored = harness.list_of(harness.at_least(sum(STORE_SETS.values()) + RETAIN_ROWS))
    add("--stored", stored, [10**3, 10**4, 10**5, 10**6], "numbers of stored rows")
    add("--dir", harness.user_path, "runs", "where stores are written and removed")
    add("--windows", harness.at_least(1), 7, "measurements of each")


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Measures the parts that --only names."""
    flags.dir.mkdir(parents=True, exist_ok=True)
    parts = {"sizes": measure_sizes, "store": measure_store}
    return {
        "preset": flags.preset,
        **{name: parts[name](flags, Progress(f"scale, {name}")) for name in flags.only},
    }


def make_tables(measured: dict[str, Any]) -> list[Table]:
    """Returns a table for each measured part."""
    result, preset = [], measured["preset"]
    if "sizes" in measured:
        title = f"{preset}: a run of ccu_plus"
        result.append(harness.make_table(title, _SIZE_COLUMNS, measured["sizes"]))
    if "store" in measured:
        title = f"{preset}: a run of ccu_plus as the store grows"
        note = "the page cache holds the stores, as they were just written"
        rows = measured["store"]
        result.append(harness.make_table(title, _STORE_COLUMNS, rows, note))
    return result


# --- sizes ----------------------------------------------------------------------------

_SIZE_COLUMNS = [
    Column("sweep", "sweep"),
    Column("size", "size", ","),
    Column("features", "features"),
    Column("start ms", "start_s.median", ",.1f", 1e3),
    *harness.spread_columns("run ms", "seconds", ",.1f", 1e3),
]


class Point(NamedTuple):
    """One size of a sweep, and the problem to run."""

    sweep: str
    size: int
    problem: Problem


def measure_sizes(flags: argparse.Namespace, progress: Progress) -> Rows:
    """Runs ccu_plus at every point of every sweep, the points of a sweep in turn."""
    spec, executor = problems.PRESETS[flags.preset], EXECUTORS[flags.executor]()
    results = []
    for sweep in (sweep_sets, sweep_classes, sweep_images):
        points = list(sweep(spec, executor))
        calls = {
            i: problems.make_run("ccu_plus", point.problem)
            for i, point in enumerate(points)
        }
        outcomes = harness.measure_in_turn(calls, flags.windows, progress)
        results += [
            {
                "sweep": point.sweep,
                "size": point.size,
                "features": point.problem.config.run.features,
                "start_s": harness.summarize([o.seconds["start"] for o in outcomes[i]]),
                "seconds": harness.summarize([_run_s(o) for o in outcomes[i]]),
            }
            for i, point in enumerate(points)
        ]
    return results


def _run_s(outcome: Outcome) -> float:
    return outcome.seconds["start"] + outcome.seconds["steps"]


def sweep_sets(spec: ProblemSpec, executor: Executor) -> Iterator[Point]:
    """Grows the unlearn set, at equal steps or equal epochs, and the retain set."""
    sizes = {"unlearn": round(max(UNLEARN_FRACTIONS) * TRAIN_ROWS), "validation": 1000}
    sizes |= {"unseen": 100, "test": 100}
    spec = spec._replace(num_rows=TRAIN_ROWS + 1200)
    sets, store = problems.split_rows(TRAIN_ROWS + 1200, **sizes), random_store(spec)
    problem = make_problem(spec, executor, sets=sets, store=store, has_images=False)
    configured = problem.config.ccu_plus.steps
    for fraction in UNLEARN_FRACTIONS:
        size = round(fraction * TRAIN_ROWS)
        smaller = problem._replace(sets=sets._replace(unlearn=sets.unlearn[:size]))
        yield Point("unlearn set, same steps", size, smaller)
        steps = max(1, round(configured * fraction / problems.UNLEARN_FRACTION))
        smaller = replace_section(smaller, "ccu_plus", steps=steps)
        yield Point("unlearn set, same epochs", size, smaller)
    unlearn = sets.unlearn[: round(problems.UNLEARN_FRACTION * TRAIN_ROWS)]
    # 0: all rows of the retain set, not a sample.
    problem = replace_section(problem, "ccu_plus", max_retain_rows=0)
    for size in RETAIN_SIZES:
        smaller = sets._replace(unlearn=unlearn, retain=sets.retain[:size])
        yield Point("retain set", size, problem._replace(sets=smaller))


def sweep_classes(spec: ProblemSpec, executor: Executor) -> Iterator[Point]:
    """Grows the number of classes."""
    for size in NUM_CLASSES:
        spec = spec._replace(num_classes=size)
        store = random_store(spec)
        problem = make_problem(spec, executor, store=store, has_images=False)
        yield Point("classes", size, problem)


def sweep_images(spec: ProblemSpec, executor: Executor) -> Iterator[Point]:
    """Grows image size and depth, with features stored and computed."""
    patch, configured = spec.config.model.patch, spec.config.data.image_size
    sizes = [round(scale * configured / patch) * patch for scale in IMAGE_SCALES]
    specs = [replace_section(spec, "data", image_size=size) for size in sizes]
    specs += [replace_section(spec, "model", image_depth=depth) for depth in DEPTHS]
    names = ["image size"] * len(sizes) + ["depth"] * len(DEPTHS)
    for sweep, size, sized in zip(names, [*sizes, *DEPTHS], specs, strict=True):
        store = random_store(sized)
        problem = make_problem(sized, executor, store=store)
        for features in ("stored", "computed"):
            problem = replace_section(problem, "run", features=features)
            yield Point(sweep, size, problem)


# --- stored rows ----------------------------------------------------------------------

_STORE_COLUMNS = [
    Column("stored rows", "rows", ","),
    Column("disk MiB", "disk_mib", ",.0f"),
    Column("write s", "write_s", ",.1f"),
    *harness.spread_columns("run ms", "seconds", ",.1f", 1e3),
    Column("x first", "ratio", ".2f"),
    Column("memory MiB", "memory_mib", ",.0f"),
]


def measure_store(flags: argparse.Namespace, progress: Progress) -> Rows:
    """Measures the same run with stores of different sizes."""
    spec, executor = problems.PRESETS[flags.preset], EXECUTORS[flags.executor]()
    results: dict[int, dict[str, Any]] = {}
    calls: dict[int, Callable[[], dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=flags.dir) as folder:
        for num_rows in flags.stored:
            path, start = pathlib.Path(folder) / str(num_rows), time.perf_counter()
            compute = problems.random_features(spec, num_rows)
            write_progress = functools.partial(progress, f"writing {num_rows:,} rows")
            feature_store.write(path, _IDENTITY, num_rows, compute, write_progress)
            results[num_rows] = {
                "rows": num_rows,
                "write_s": time.perf_counter() - start,
                "disk_mib": sum(x.stat().st_size for x in path.iterdir()) / 2**20,
            }
            problem = make_problem(
                spec._replace(num_rows=num_rows),
                executor,
                sets=problems.split_rows(num_rows, **STORE_SETS),
                has_images=False,
            )
            problem = replace_section(problem, "ccu_plus", max_retain_rows=RETAIN_ROWS)
            run = problems.make_run("ccu_plus", problem)
            calls[num_rows] = functools.partial(_run_with_store, run, problem, path)
        windows = harness.measure_in_turn(calls, flags.windows, progress)
    for num_rows, result in results.items():
        seconds = harness.summarize([window["seconds"] for window in windows[num_rows]])
        result["seconds"] = seconds
        result["memory_mib"] = max(window["memory_mib"] for window in windows[num_rows])
        first = results[flags.stored[0]]["seconds"]
        result["ratio"] = harness.median_ratio(seconds, first)
    return [*results.values()]


def _run_with_store(
    run: Callable[[Problem], Outcome], problem: Problem, path: pathlib.Path
) -> dict[str, float]:
    """Opens a store and runs; returns the seconds and the growth of memory."""
    before_mib, start = harness.memory_mib("RssAnon"), time.perf_counter()
    store = feature_store.read(path, _IDENTITY)
    if store is None:
        raise UserError(f"{path}: the feature store cannot be read back")
    open_s = time.perf_counter() - start
    outcome = run(problem._replace(store=store))
    return {
        "seconds": open_s + _run_s(outcome),
        "memory_mib": harness.memory_mib("RssAnon") - before_mib,
    }


COMMANDS = {"scale": Command(HELP, add_flags, measure, make_tables)}

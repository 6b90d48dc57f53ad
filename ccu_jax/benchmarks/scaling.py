"""`python -m ccu_jax.benchmarks scale`: how the cost of a request grows.

`sizes`: runs of ccu_plus as one size grows. `store`: the same request beside more and
more stored rows.
"""

import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from ccu_jax.benchmarks import problems
from ccu_jax.benchmarks.harness import (
    Progress,
    measure_in_turn,
    median_ratio,
    memory_mib,
    summarize,
)
from ccu_jax.distributed.executors import EXECUTORS
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store
from ccu_jax.methods import Problem

HELP = "growth of costs: sets, classes, images, depth, stored rows"
PARTS = ("sizes", "store")
UNLEARN_ROWS, VALIDATION_ROWS, RETAIN_ROWS = 100, 150, 500  # of a request
UNLEARN_FRACTIONS = (0.01, 0.03, 0.1, 0.2, 0.3)
RETAIN_SIZES = (1000, 2000, 4000, 7000)
NUM_CLASSES = (2, 10, 100)
IMAGE_SCALES = (0.5, 1.0, 2.0)
DEPTHS = (1, 2, 8)
TRAIN_ROWS = 10_000  # of the sweeps over sets
_FACTS = {"checkpoint": "random", "fingerprint": "bench"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    add = parser.add_argument
    add("--preset", choices=tuple(problems.PRESETS), default="clipart")
    executors = tuple(name for name in EXECUTORS if name != "vmap")
    add("--executor", choices=executors, default="pmap")
    add("--only", metavar="A,B", default=",".join(PARTS), help="default %(default)s")
    stored = "1000,10000,100000,1000000"
    add("--stored", metavar="N,N", type=_counts, default=stored, help="stored rows")
    add("--windows", metavar="N", type=int, default=7, help="default 7")
    add(
        "--dir",
        metavar="DIR",
        type=lambda text: pathlib.Path(text).expanduser(),
        default=pathlib.Path("runs"),
        help="where the stores are written while they are measured; default runs",
    )


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from None


def check_flags(flags: argparse.Namespace) -> None:
    """Raises UserError on flags that cannot be measured."""
    for part in flags.only.split(","):
        if part not in PARTS:
            choices = ", ".join(PARTS)
            raise UserError(f"--only: unknown part {part!r}; choose from {choices}")
    if flags.windows < 1:
        raise UserError("--windows: must be at least 1")
    min_rows = 2 * (UNLEARN_ROWS + VALIDATION_ROWS) + RETAIN_ROWS
    if flags.stored[0] < min_rows or len(flags.stored) < 2:
        raise UserError(f"--stored: give at least two numbers from {min_rows:,} up")
    try:
        flags.dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dir: cannot make {flags.dir}: {error.strerror}") from None


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Measures the parts that --only names."""
    calls = {"sizes": measure_sizes, "store": measure_store}
    parts = flags.only.split(",")
    return {
        "preset": flags.preset,
        "windows": flags.windows,
        **{part: calls[part](flags, Progress(f"scale, {part}")) for part in parts},
    }


# --- sizes ----------------------------------------------------------------------------


class Point(NamedTuple):
    """One size of a sweep, and the problem to run."""

    sweep: str
    value: float
    problem: Problem


def measure_sizes(
    flags: argparse.Namespace, progress: Progress
) -> list[dict[str, Any]]:
    """Runs ccu_plus at every point of every sweep, the points of a sweep in turn."""
    sizes, executor = problems.PRESETS[flags.preset], EXECUTORS[flags.executor]()
    results = []
    for sweep in (sweep_sets, sweep_classes, sweep_images):
        points = list(sweep(sizes, executor))
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            calls = {
                i: problems.make_unlearn(point.problem, path)
                for i, point in enumerate(points)
            }
            runs = measure_in_turn(calls, flags.windows, progress)
        for i, point in enumerate(points):
            results.append(
                {
                    "sweep": point.sweep,
                    "value": point.value,
                    "features": point.problem.config.run.features,
                    "start": summarize([run["start"] for run in runs[i]]),
                    "seconds": summarize([r["start"] + r["steps"] for r in runs[i]]),
                }
            )
    return results


def sweep_sets(sizes: problems.Sizes, executor: Any) -> Iterator[Point]:
    """Grows the unlearn set, at fixed steps or fixed passes, and the retain set."""
    max_rows = round(max(UNLEARN_FRACTIONS) * TRAIN_ROWS)
    sizes = sizes._replace(rows=TRAIN_ROWS + 1200)
    sets = problems.sized_sets(sizes.rows, max_rows, 1000)
    store = problems.random_store(sizes)
    problem = problems.make_feature_problem(sizes, executor, sets, store)
    configured = problem.config.ccu_plus.steps
    for fraction in UNLEARN_FRACTIONS:
        rows = round(fraction * TRAIN_ROWS)
        smaller = problem._replace(sets=sets._replace(unlearn=sets.unlearn[:rows]))
        yield Point("unlearn set, same steps", rows, smaller)
        steps = max(1, round(configured * fraction / 0.1))
        passes = problems.replace_section(smaller, "ccu_plus", steps=steps)
        yield Point("unlearn set, same passes", rows, passes)
    unlearn = sets.unlearn[: TRAIN_ROWS // 10]
    problem = problems.replace_section(problem, "ccu_plus", retain_rows=0)
    for rows in RETAIN_SIZES:
        smaller = sets._replace(unlearn=unlearn, retain=sets.retain[:rows])
        yield Point("retain set", rows, problem._replace(sets=smaller))


def sweep_classes(sizes: problems.Sizes, executor: Any) -> Iterator[Point]:
    """Grows the number of classes."""
    for classes in NUM_CLASSES:
        many = sizes._replace(classes=classes)
        rng = np.random.default_rng(0)
        sets = problems.random_sets(problems.make_config(many), many, rng)
        store = problems.random_store(many)
        problem = problems.make_feature_problem(many, executor, sets, store)
        yield Point("classes", classes, problem)


def sweep_images(sizes: problems.Sizes, executor: Any) -> Iterator[Point]:
    """Grows image size and depth, with features stored and computed."""
    patch = problems.make_config(sizes).model.patch
    sides = [round(scale * sizes.image_size / patch) * patch for scale in IMAGE_SCALES]
    points = [("image size", side, sizes._replace(image_size=side)) for side in sides]
    for depth in DEPTHS:
        model = tuple({**dict(sizes.model), "image_depth": depth}.items())
        points.append(("image depth", depth, sizes._replace(model=model)))
    for sweep, value, of_point in points:
        problem = problems.make_problem(of_point, executor)
        problem = problem._replace(store=problems.random_store(of_point))
        for features in ("stored", "computed"):
            yield Point(
                sweep,
                value,
                problems.replace_section(problem, "run", features=features),
            )


# --- stored rows ----------------------------------------------------------------------


def measure_store(
    flags: argparse.Namespace, progress: Progress
) -> list[dict[str, Any]]:
    """Measures the same request beside stores of different sizes."""
    sizes, executor = problems.PRESETS[flags.preset], EXECUTORS[flags.executor]()
    results: dict[int, dict[str, Any]] = {}
    calls: dict[int, Callable[[], dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=flags.dir) as folder:
        for rows in flags.stored:
            path, start = pathlib.Path(folder) / str(rows), time.perf_counter()
            columns = problems.random_features(sizes, rows)
            write_progress = functools.partial(progress, f"writing {rows:,} rows")
            feature_store.write(path, _FACTS, rows, columns, write_progress)
            results[rows] = {"rows": rows, "write_s": time.perf_counter() - start}
            disk = sum(file.stat().st_size for file in path.iterdir())
            results[rows]["disk_mib"] = disk / 2**20
            sized = sizes._replace(rows=rows)
            sets = problems.sized_sets(rows, UNLEARN_ROWS, VALIDATION_ROWS)
            store = _open_store(path)
            problem = problems.make_feature_problem(sized, executor, sets, store)
            problem = problems.replace_section(
                problem, "ccu_plus", retain_rows=RETAIN_ROWS
            )
            calls[rows] = functools.partial(_request, problem, path)
        runs = measure_in_turn(calls, flags.windows, progress)
    for rows, windows in runs.items():
        results[rows]["seconds"] = summarize([run["seconds"] for run in windows])
        memory = [run["memory_mib"] for run in windows]
        results[rows]["memory_mib"] = None if None in memory else max(memory)
    return list(results.values())


def _open_store(path: pathlib.Path) -> feature_store.FeatureStore:
    store = feature_store.read(path, _FACTS)
    if store is None:
        raise UserError(f"{path}: the feature store cannot be read")
    return store


def _request(problem: Problem, path: pathlib.Path) -> dict[str, Any]:
    before, start = memory_mib("RssAnon"), time.perf_counter()
    problem = problem._replace(store=_open_store(path))
    opened = time.perf_counter() - start
    run = problems.make_unlearn(problem, path)()
    after = memory_mib("RssAnon")
    return {
        "seconds": opened + run["start"] + run["steps"],
        "memory_mib": None if before is None or after is None else after - before,
    }


def tables(measured: dict[str, Any]) -> list[Table]:
    """Returns a table for each measured part."""
    return [
        make(measured[part], measured["preset"])
        for part, make in (("sizes", _sizes_table), ("store", _store_table))
        if part in measured
    ]


def _sizes_table(results: list[dict[str, Any]], preset: str) -> Table:
    header = ("sweep", "size", "features", "start ms", "run ms", "low", "high")
    table = Table(*header, title=f"{preset}: a run of ccu_plus")
    for result in results:
        run = result["seconds"]
        table.add_row(
            result["sweep"],
            f"{result['value']:,}",
            result["features"],
            f"{1e3 * result['start']['median']:.1f}",
            *(f"{1e3 * run[name]:.1f}" for name in ("median", "low", "high")),
        )
    return table


def _store_table(results: list[dict[str, Any]], preset: str) -> Table:
    header = ("stored rows", "disk MiB", "write s", "request ms", "low", "high")
    title = f"{preset}: a request of ccu_plus beside stored rows"
    table = Table(*header, "x fewest rows", "memory MiB", title=title)
    table.caption = "stores were just written, so they are read from the page cache"
    for result in results:
        run, memory = result["seconds"], result["memory_mib"]
        table.add_row(
            f"{result['rows']:,}",
            f"{result['disk_mib']:,.0f}",
            f"{result['write_s']:.1f}",
            *(f"{1e3 * run[name]:.1f}" for name in ("median", "low", "high")),
            f"{median_ratio(run, results[0]['seconds']):.2f}",
            "" if memory is None else f"{memory:,.0f}",
        )
    return table

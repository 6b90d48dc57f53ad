"""`python -m ccu_jax.benchmarks scale`: how the run time of ccu_plus scales.

`sizes`: with the sizes of sets, images and models. `store`: with the size of the
feature store, for a run on a fixed number of rows.
"""

import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from ccu_jax.benchmarks import harness, problems
from ccu_jax.benchmarks.harness import Column, Flag, Measurements, Progress
from ccu_jax.benchmarks.problems import make_problem, make_run, replace_section
from ccu_jax.distributed.executors import pmap
from ccu_jax.errors import UserError
from ccu_jax.evaluate import feature_store
from ccu_jax.methods import Problem
from ccu_jax.runs.results import unlearning_seconds
from ccu_jax.train.loop import Outcome

UNLEARN_FRACTIONS = (0.01, 0.03, 0.1, 0.2, 0.3)
RETAIN_SIZES = (1000, 2000, 4000, 7000)
NUM_CLASSES = (2, 10, 100)
IMAGE_SCALES = (0.5, 1.0, 2.0)
DEPTHS = (1, 2, 8)
TRAIN_ROWS = 10_000  # in `sweep_sets`
# Set sizes of the run in `measure_store`.
STORE_SETS = {"unlearn": 100, "validation": 150, "unseen": 15, "test": 15}
RETAIN_ROWS = 500  # ccu_plus.max_retain_rows of that run
_IDENTITY = {"checkpoint": "random", "fingerprint": "random rows"}
Point = tuple[str, int, Problem]  # name of the sweep, size, problem


def measure(flags: argparse.Namespace) -> list[Measurements]:
    """Runs the benchmarks that --only selects."""
    flags.dir.mkdir(parents=True, exist_ok=True)
    return [_PARTS[name](flags) for name in flags.only]


def measure_sizes(flags: argparse.Namespace) -> Measurements:
    """Measures runs of ccu_plus at every point of every sweep, interleaved by sweep."""
    rows, progress = [], Progress("scale, sizes")
    for sweep in (sweep_sets, sweep_classes, sweep_images):
        points = list(enumerate(sweep(problems.PRESETS[flags.preset])))
        calls = {i: make_run("ccu_plus", problem) for i, (*_, problem) in points}
        outcomes = harness.measure_interleaved(calls, flags.windows, progress)
        rows += [
            {
                "sweep": name,
                "size": size,
                "features": problem.config.run.features,
                "start_s": harness.summarize([o.seconds["start"] for o in outcomes[i]]),
                "seconds": harness.summarize(
                    [unlearning_seconds(o)["unlearn"] for o in outcomes[i]]
                ),
            }
            for i, (name, size, problem) in points
        ]
    columns = [
        Column("sweep", "sweep"),
        Column("size", "size", ","),
        Column("features", "features"),
        Column("start ms", "start_s.median", ",.1f", 1e3),
        Column("run ms", "seconds", ",.1f", 1e3),
    ]
    return Measurements("sizes", f"{flags.preset}: a run of ccu_plus", columns, rows)


def sweep_sets(spec: problems.ProblemSpec) -> Iterator[Point]:
    """Yields points of growing unlearn sets (equal steps or epochs) and retain sets."""
    sizes = {"unlearn": round(max(UNLEARN_FRACTIONS) * TRAIN_ROWS), "validation": 1000}
    sizes |= {"unseen": 100, "test": 100}
    spec = spec._replace(num_rows=TRAIN_ROWS + 1200)
    sets = problems.split_rows(spec.num_rows, **sizes)
    problem = make_problem(spec, pmap(), sets=sets, has_images=False)
    configured = problem.config.ccu_plus.steps
    for fraction in UNLEARN_FRACTIONS:
        size = round(fraction * TRAIN_ROWS)
        smaller = problem._replace(sets=sets._replace(unlearn=sets.unlearn[:size]))
        yield "unlearn set, same steps", size, smaller
        steps = max(1, round(configured * fraction / problems.UNLEARN_FRACTION))
        smaller = replace_section(smaller, "ccu_plus", steps=steps)
        yield "unlearn set, same epochs", size, smaller
    unlearn = sets.unlearn[: round(problems.UNLEARN_FRACTION * TRAIN_ROWS)]
    # 0 uses the whole retain set instead of a sample.
    problem = replace_section(problem, "ccu_plus", max_retain_rows=0)
    for size in RETAIN_SIZES:
        smaller = sets._replace(unlearn=unlearn, retain=sets.retain[:size])
        yield "retain set", size, problem._replace(sets=smaller)


def sweep_classes(spec: problems.ProblemSpec) -> Iterator[Point]:
    """Yields points of a growing number of classes."""
    for size in NUM_CLASSES:
        spec = spec._replace(num_classes=size)
        yield "classes", size, make_problem(spec, pmap(), has_images=False)


def sweep_images(spec: problems.ProblemSpec) -> Iterator[Point]:
    """Yields points of growing image size or depth, with both kinds of features."""
    patch, image_size = spec.config.model.patch, spec.config.data.image_size
    sizes = [round(scale * image_size / patch) * patch for scale in IMAGE_SCALES]
    fields = [("image size", size, "data", "image_size") for size in sizes]
    fields += [("depth", depth, "model", "image_depth") for depth in DEPTHS]
    for sweep, size, section, field in fields:
        sized = replace_section(spec, section, **{field: size})
        problem = make_problem(sized, pmap())
        for features in ("stored", "computed"):
            yield sweep, size, replace_section(problem, "run", features=features)


def measure_store(flags: argparse.Namespace) -> Measurements:
    """Measures one run of ccu_plus with feature stores of different sizes."""
    spec, progress = problems.PRESETS[flags.preset], Progress("scale, store")
    rows: dict[int, dict[str, Any]] = {}
    calls: dict[int, Callable[[], dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=flags.dir) as folder:
        for num_rows in flags.stored:
            path = pathlib.Path(folder) / str(num_rows)
            compute = problems.make_random_features(spec, num_rows)
            write_progress = functools.partial(progress, f"writing {num_rows:,} rows")
            feature_store.write(path, _IDENTITY, num_rows, compute, write_progress)
            rows[num_rows] = {
                "rows": num_rows,
                "disk_mib": sum(x.stat().st_size for x in path.iterdir()) / 2**20,
            }
            sized = spec._replace(num_rows=num_rows)
            sets = problems.split_rows(num_rows, **STORE_SETS)
            absent = {"has_store": False, "has_images": False}
            problem = make_problem(sized, pmap(), sets=sets, **absent)
            problem = replace_section(problem, "ccu_plus", max_retain_rows=RETAIN_ROWS)
            run = make_run("ccu_plus", problem)
            calls[num_rows] = functools.partial(_run_with_store, run, problem, path)
        windows = harness.measure_interleaved(calls, flags.windows, progress)
    for num_rows, row in rows.items():
        row["seconds"] = harness.summarize([w["seconds"] for w in windows[num_rows]])
        row["memory_mib"] = max(w["memory_mib"] for w in windows[num_rows])
        first = rows[flags.stored[0]]["seconds"]
        row["ratio"] = harness.median_ratio(row["seconds"], first)
    columns = [
        Column("stored rows", "rows", ","),
        Column("disk MiB", "disk_mib", ",.0f"),
        Column("run ms", "seconds", ",.1f", 1e3),
        Column("ratio to first", "ratio", ".2f"),
        Column("memory MiB", "memory_mib", ",.0f"),
    ]
    title = f"{flags.preset}: a run of ccu_plus as the store grows"
    note = "the stores were just written, so they are in the page cache"
    return Measurements("store", title, columns, [*rows.values()], note)


def _run_with_store(
    run: Callable[[Problem], Outcome], problem: Problem, path: pathlib.Path
) -> dict[str, float]:
    """Opens the store and runs; returns the wall time and the increase in memory."""
    before_mib, start = harness.read_memory_mib("RssAnon"), time.perf_counter()
    store = feature_store.read(path, _IDENTITY)
    if store is None:
        raise UserError(f"{path}: unreadable store; check the disk and rerun")
    open_s = time.perf_counter() - start
    outcome = run(problem._replace(store=store))
    return {
        "seconds": open_s + unlearning_seconds(outcome)["unlearn"],
        "memory_mib": harness.read_memory_mib("RssAnon") - before_mib,
    }


_PARTS = {"sizes": measure_sizes, "store": measure_store}
_STORED = harness.list_of(harness.at_least(sum(STORE_SETS.values()) + RETAIN_ROWS))
_FLAGS = [
    problems.PRESET_FLAG,
    harness.names_flag("--only", _PARTS, "", "parts to run"),
    Flag("--stored", _STORED, "1000,10000,100000,1000000", "store sizes in rows"),
    Flag("--dir", harness.parse_path, "runs", "directory for temporary stores"),
]
_HELP = "scaling with sets, classes, image size, depth and stored rows"
COMMANDS = {"scale": harness.Command(_HELP, _FLAGS, 7, measure)}

"""What a run of ccu_plus costs as sizes grow, one of them at a time."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks import scale_problem as bench_scale_problem
from ccu_jax.benchmarks.harness import in_turn, spread
from ccu_jax.benchmarks.problems import Sizes
from ccu_jax.methods import Problem

UNLEARN, PASSES = "unlearn set", "unlearn set, same passes"
RETAIN, CLASSES = "retain set", "classes"
IMAGE, DEPTH = "image size", "depth of the picture tower"
STORED, COMPUTED = "stored", "computed"

# What is swept over; the sizes of pictures are multiples of the preset's.
SHARES = (0.01, 0.03, 0.1, 0.2, 0.3)
RETAINED = (1000, 2000, 4000, 7000)
NUM_CLASSES = (2, 10, 100)
IMAGE_FACTORS = (0.5, 1.0, 2.0)
DEPTHS = (1, 2, 8)
TRAINED = 10_000  # training rows of the sweeps over sets
_HELD = 1000  # rows that are held out there
_USUAL = 0.1  # the share at which `same passes` makes the configured steps


class Point(NamedTuple):
    """One size of a sweep: a problem for the unlearning, and what is told of it.

    `value` is what was swept over, in rows where it is a set; `features`: STORED with
    the original, or COMPUTED in the run, from the pictures.
    """

    sweep: str
    value: float
    features: str
    steps: int
    problem: Problem


def measure(preset: str, executor: str, windows: int, tell) -> list[dict[str, Any]]:
    """Every point of every sweep, those of a sweep in turn.

    Args:
        preset: of the rows and the model, where they are not swept over.
        executor: a row of `parallel.EXECUTORS`.
        windows: runs of each.
        tell: progress.
    """
    sizes, told = bench_problem.PRESETS[preset], []
    for sweep in (_sets, _classes, _pictures):
        points = list(sweep(sizes, executor))
        with tempfile.TemporaryDirectory() as folder:
            runs = [
                bench_scale_problem.unlearner(point.problem, pathlib.Path(folder))
                for point in points
            ]
            found = in_turn(runs, windows, tell)
        for point, took in zip(points, found, strict=True):
            told.append(_told(point, took))
    return told


def _told(point, took):
    return {
        "sweep": point.sweep,
        "value": point.value,
        "features": point.features,
        "steps": point.steps,
        "start": spread([s["start"] for s in took]),
        "steps_s": spread([s["steps"] for s in took]),
        "seconds": spread([s["start"] + s["steps"] for s in took]),
    }


def _point(sweep, value, problem, features=STORED, steps=None) -> Point:
    config = problem.config
    plus = config.ccu_plus
    plus = dataclasses.replace(plus, steps=steps or plus.steps)
    run = dataclasses.replace(
        config.run, features=features, checkpoint_steps=plus.steps
    )
    config = dataclasses.replace(config, ccu_plus=plus, run=run)
    problem = problem._replace(config=config)
    return Point(sweep, value, features, plus.steps, problem)


def _sets(sizes: Sizes, executor) -> Iterator[Point]:
    """Unlearn set and retain set: rows of the same data, with all else as it was."""
    most = round(max(SHARES) * TRAINED)
    wide = sizes._replace(rows=TRAINED + _HELD + 2 * max(1, _HELD // 10))
    sets = bench_scale_problem.sets_of(wide, most, _HELD)
    store = bench_scale_problem.random_store(wide)
    problem = bench_scale_problem.make(wide, executor, sets, store)
    plus = problem.config.ccu_plus
    usual = max(1, round(_USUAL * TRAINED))
    for share in SHARES:
        rows = max(1, round(share * TRAINED))
        fewer = problem._replace(sets=sets._replace(unlearn=sets.unlearn[:rows]))
        steps = max(1, round(plus.steps * rows / usual))
        yield _point(UNLEARN, rows, fewer)
        yield _point(PASSES, rows, fewer, steps=steps)
    plus = dataclasses.replace(plus, max_retain_rows=0)  # all of them
    config = dataclasses.replace(problem.config, ccu_plus=plus)
    for rows in RETAINED:
        if rows <= len(sets.retain):
            kept = sets._replace(
                unlearn=sets.unlearn[:usual], retain=sets.retain[:rows]
            )
            yield _point(RETAIN, rows, problem._replace(config=config, sets=kept))


def _classes(sizes: Sizes, executor) -> Iterator[Point]:
    for classes in NUM_CLASSES:
        many = sizes._replace(classes=classes)
        # All other sizes are the preset's, and so are the sets.
        drawn = np.random.default_rng(0)
        sets = bench_problem.sets(bench_problem.settings(many), many, drawn)
        store = bench_scale_problem.random_store(many)
        problem = bench_scale_problem.make(many, executor, sets, store)
        yield _point(CLASSES, classes, problem)


def _pictures(sizes: Sizes, executor) -> Iterator[Point]:
    """Image size and depth: what features spare, and what computing them costs."""
    patch = bench_problem.settings(sizes).model.patch
    sides = dict.fromkeys(
        max(1, round(factor * sizes.image_size / patch)) * patch
        for factor in IMAGE_FACTORS
    )
    swept = [(IMAGE, side, sizes._replace(image_size=side)) for side in sides]
    for depth in DEPTHS:
        model = {**dict(sizes.model), "image_depth": depth}
        swept.append((DEPTH, depth, sizes._replace(model=tuple(model.items()))))
    for sweep, value, of in swept:
        problem = bench_problem.make(of, executor)
        problem = problem._replace(store=bench_scale_problem.random_store(of))
        yield _point(sweep, value, problem, STORED)
        yield _point(sweep, value, problem, COMPUTED)


def line(rows, seconds) -> dict[str, float]:
    """The line of least squares through medians, and how well it fits.

    Returns:
        `fixed_s` and `row_s` of `seconds = fixed_s + row_s * rows`; `r2`, the share of
        the variance that it explains; `apart`, its largest distance as a share of what
        was measured.
    """
    rows, seconds = np.asarray(rows, float), np.asarray(seconds, float)
    row_s, fixed_s = np.polyfit(rows, seconds, 1)
    apart = seconds - (fixed_s + row_s * rows)
    spare = max(float(np.sum((seconds - seconds.mean()) ** 2)), 1e-30)
    return {
        "fixed_s": float(fixed_s),
        "row_s": float(row_s),
        "r2": float(1 - np.sum(apart**2) / spare),
        "apart": float(np.max(np.abs(apart) / seconds)),
    }

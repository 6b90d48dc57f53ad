"""`--tune TRIALS`: a random search of the settings of every method, at equal effort.

Every method gets the same number of trials, with ranges from `search_spaces.py`. All
trials are scored by the same objective on the unlearn set, the retain set and the
holdout, never on test rows. The first trial is the configuration itself. It and the
best trials of the first seed are repeated on the other seeds; the best mean wins.
"""

import dataclasses
import hashlib
import math
import pathlib
from typing import Any

import numpy as np
from scipy.stats import qmc

from ccu_jax.config.schema import Config
from ccu_jax.distributed.hosts import is_primary
from ccu_jax.experiments.search_spaces import search_space
from ccu_jax.experiments.variants import (
    ATTACKED_VIEWS,
    Settings,
    open_variants,
    run_variant,
    without_test_rows,
)
from ccu_jax.methods import REFERENCE, REFERENCES, Problem
from ccu_jax.models import VIEWS
from ccu_jax.reports.summary import DASH, get_attack_auc, get_score
from ccu_jax.reports.tables import Table
from ccu_jax.runs import forecast
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import Stage
from ccu_jax.runs.results import Result, load_result, result_path, source_commit
from ccu_jax.storage.files import write_json

NUM_FINALISTS = 3


@dataclasses.dataclass(eq=False)
class Trial:
    """Settings that were tried, and for each seed the objective and the result."""

    settings: Settings
    objectives: list[float]
    results: list[Result]

    def to_json(self) -> dict[str, Any]:
        """Returns the trial as it is stored in `tuning.json`."""
        seconds = [result["seconds"]["unlearn"] for result in self.results]
        return {
            "settings": self.settings,
            "objectives": [x if math.isfinite(x) else None for x in self.objectives],
            "seconds": float(np.mean(seconds)),
            "diverged": self.results[0]["diverged"],
        }


def tune(config: Config, workdir: pathlib.Path, trials: int) -> dict[str, Any]:
    """Tunes all methods of a configuration but the references.

    Args:
        config: its `seeds` are those to tune on.
        workdir: the working folder of a run of this configuration.
        trials: number of trials of each method.

    Returns:
        The content of `tuning.json`, which is also printed as a table.

    Raises:
        UserError: the configuration or the folder cannot be used.
    """
    names = [name for name in config.methods if name not in REFERENCES]
    titles = [f"tune {name}" for name in names]
    expected = "a method with settings to tune"
    with open_variants(config, workdir, names, expected, titles) as (ctx, problems):
        problems = [without_test_rows(problem) for problem in problems]
        runs = dict.fromkeys(names, _max_runs(trials, len(problems)))
        ctx.reporter.log(forecast.describe_runs(ctx, runs))
        tried = {}
        for name, title in zip(names, titles, strict=True):
            with ctx.reporter.stage(title) as stage:
                tried[name] = _tune_method(ctx, problems, name, trials, stage)
        path = workdir / "tuning.json"
        record = _build_record(config, trials, tried)
        if is_primary():
            write_json(path, record)
        _build_table(record).show(ctx.reporter)
        ctx.reporter.log(f"tuned: {path}; its `winners` are the settings to use")
        return record


def draw_candidates(method: str, section: Any, trials: int) -> list[Settings]:
    """Returns the settings to try; the first ones change nothing.

    The others are a Sobol sequence over the ranges, Owen-scrambled with a seed from
    the method's name, so every call returns the same.
    """
    space = search_space(method, section)
    seed = int.from_bytes(hashlib.blake2b(method.encode(), digest_size=4).digest())
    sobol = qmc.Sobol(len(space), rng=np.random.default_rng(seed))
    points = sobol.random_base2(max(0, math.ceil(math.log2(max(trials - 1, 1)))))
    candidates: list[Settings] = [{}]
    for point in points[: trials - 1]:
        settings: Settings = {}
        for (name, range_), fraction in zip(space.items(), point, strict=True):
            value = range_.at(float(fraction))
            is_integer = isinstance(getattr(section, name), int)
            settings[name] = round(value) if is_integer else float(f"{value:.4g}")
        candidates.append(settings)
    return candidates


def objective(result: Result, reference: Result) -> float:
    """Returns the distance of a model from the retrained reference; less is better.

    The mean over attacked views of 2 |AUC - AUC of the reference|, plus the mean over
    views of the score lost on the holdout (a gain is negative), plus the fused score
    lost on the retain set (a gain is zero). Infinite if the model diverged or an AUC is
    missing.
    """
    if result.get("diverged"):
        return math.inf
    leaks = [
        2 * abs(get_attack_auc(result, view) - get_attack_auc(reference, view))
        for view in ATTACKED_VIEWS
    ]

    def lost_score(split: str, view: str) -> float:
        before, after = (get_score(r, split, view) for r in (reference, result))
        return (before - after) / 100

    lost = [lost_score("unseen", view) for view in VIEWS]
    total = np.mean(leaks) + np.mean(lost) + max(lost_score("retain", "fused"), 0.0)
    return float(total) if math.isfinite(total) else math.inf


def _max_runs(trials: int, num_seeds: int) -> int:
    """Returns the number of trials and of repetitions on the other seeds."""
    return trials + (num_seeds - 1) * min(NUM_FINALISTS + 1, trials)


def _tune_method(
    ctx: RunContext, problems: list[Problem], name: str, trials: int, stage: Stage
) -> list[Trial]:
    """Returns all trials of a method, the best first."""
    candidates = draw_candidates(name, getattr(ctx.config, name), trials)
    tried = [Trial(settings, [], []) for settings in candidates]
    configured, total = tried[0], _max_runs(trials, len(problems))

    def run(trial: Trial, problem: Problem) -> None:
        num_runs = sum(len(trial.results) for trial in tried)
        stage.report_progress(f"trial {num_runs + 1}", num_runs, total)
        result = run_variant(ctx, problem, name, trial.settings)
        path = result_path(ctx.workdir, problem.seed, REFERENCE)
        trial.objectives.append(objective(result, load_result(path)))
        trial.results.append(result)

    for trial in tried:
        run(trial, problems[0])
    tried.sort(key=lambda trial: trial.objectives[0])
    finalists = tried[:NUM_FINALISTS]
    if configured not in finalists:
        finalists.append(configured)
    for trial in finalists:
        for problem in problems[1:]:
            run(trial, problem)
    stage.report_progress("trials", total, total)
    dropped = [trial for trial in tried if trial not in finalists]
    finalists.sort(key=lambda trial: float(np.mean(trial.objectives)))
    return [*finalists, *dropped]


def _build_record(
    config: Config, num_trials: int, tried: dict[str, list[Trial]]
) -> dict[str, Any]:
    """Returns the content of `tuning.json`; `tried` has the best trial first."""
    return {
        "config": config.name,
        "seeds": list(config.seeds),
        "trials": num_trials,
        "commit": source_commit(),
        "objective": " ".join((objective.__doc__ or "").split()),
        "spaces": {name: search_space(name, getattr(config, name)) for name in tried},
        "winners": {name: trials[0].settings for name, trials in tried.items()},
        "methods": {
            name: [trial.to_json() for trial in trials]
            for name, trials in tried.items()
        },
    }


def _build_table(record: dict[str, Any]) -> Table:
    """Returns the best trial of each method beside the configured one."""
    cells = []
    for name, trials in record["methods"].items():
        best = trials[0]
        configured = next(trial for trial in trials if not trial["settings"])
        settings = ", ".join(f"{k}={v:g}" for k, v in best["settings"].items())
        cells.append(
            {
                "method": name,
                "objective": _format_mean(best["objectives"]),
                "as configured": _format_mean(configured["objectives"]),
                "seconds": f"{best['seconds']:.2f}",
                "settings": settings or "as configured",
            }
        )
    return Table.from_cells(cells)


def _format_mean(values: list[float | None]) -> str:
    finite = [value for value in values if value is not None]
    return f"{np.mean(finite):.3f}" if len(finite) == len(values) else DASH

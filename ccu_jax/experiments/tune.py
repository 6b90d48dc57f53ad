"""`--tune TRIALS`: a random search of the settings of every method, at equal effort.

Every method gets the same number of trials, with ranges from `search_spaces.py`. All
trials are scored by the same objective on the unlearn set, the retain set and the
holdout, never on test rows. The first trial is the configuration itself. It and the
best trials of the first seed are repeated on the other seeds; the best mean wins.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

import numpy as np
from scipy.stats import qmc

from ccu_jax.config.schema import Config
from ccu_jax.distributed.hosts import is_primary
from ccu_jax.experiments import variants
from ccu_jax.experiments.search_spaces import search_space
from ccu_jax.experiments.variants import Variant, run_variant
from ccu_jax.methods import REFERENCE, REFERENCES, Problem
from ccu_jax.models import VIEWS
from ccu_jax.reports.summary import DASH, get_attack_auc, get_score
from ccu_jax.reports.tables import Table
from ccu_jax.runs import forecast
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import Stage
from ccu_jax.runs.results import Result, load_result, result_path, source_commit
from ccu_jax.runs.session import open_run
from ccu_jax.runs.stages import problem_with_original, run_seed
from ccu_jax.storage.files import write_atomically

NUM_FINALISTS = 3
ATTACKED_VIEWS = ("image", "fused", "pair")


@dataclasses.dataclass(eq=False)
class Trial:
    """Settings that were tried, and for each seed the objective and the result."""

    settings: dict[str, Any]
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
    variants.check_config(config, names, "a method with settings to tune")
    reduced = dataclasses.replace(config, methods=("original", REFERENCE))
    features = {seed: f"seed {seed}: features" for seed in config.seeds}
    titles = [*features.values(), *(f"tune {name}" for name in names), "tuned"]
    with open_run(reduced, workdir, titles) as (ctx, sets_by_seed, methods):
        variants.check_not_purged(ctx)
        for seed, sets in sets_by_seed.items():
            run_seed(ctx, seed, sets, methods)
        problems = []
        for seed, sets in sets_by_seed.items():
            with ctx.reporter.stage(features[seed]) as stage:
                problem = problem_with_original(ctx, seed, sets, stage)
            problems.append(variants.without_test_rows(problem))
        runs = dict.fromkeys(names, _max_runs(trials, len(problems)))
        ctx.reporter.log(forecast.describe_runs(ctx, runs))
        trials_by_method = {}
        for name in names:
            with ctx.reporter.stage(f"tune {name}") as stage:
                trials_by_method[name] = _tune_method(
                    ctx, problems, name, trials, stage
                )
        path = workdir / "tuning.json"
        with ctx.reporter.stage("tuned"):
            record = _build_record(config, trials, trials_by_method)
            if is_primary():
                text = json.dumps(record, indent=1) + "\n"
                write_atomically(path, text.encode())
        _build_table(record).show(ctx.reporter)
        ctx.reporter.log(f"tuned: {path}; adopt the settings under `winners`")
        return record


def candidates(method: str, section: Any, trials: int) -> list[dict[str, Any]]:
    """Returns the settings to try; the first are those of the section itself.

    The others are a Sobol sequence over the ranges, Owen-scrambled with a seed from
    the method's name, so every call returns the same.
    """
    space = search_space(method, section)
    seed = int.from_bytes(hashlib.blake2b(method.encode(), digest_size=4).digest())
    sobol = qmc.Sobol(len(space), rng=np.random.default_rng(seed))
    points = sobol.random_base2(max(0, math.ceil(math.log2(max(trials - 1, 1)))))
    settings: list[dict[str, Any]] = [{}]
    for point in points[: trials - 1]:
        values: dict[str, Any] = {}
        for (name, range_), fraction in zip(space.items(), point, strict=True):
            value = range_.at(float(fraction))
            is_integer = isinstance(getattr(section, name), int)
            values[name] = round(value) if is_integer else float(f"{value:.4g}")
        settings.append(values)
    return settings


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
        return (
            get_score(reference, split, view) - get_score(result, split, view)
        ) / 100

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
    num_runs, total = 0, _max_runs(trials, len(problems))

    def run(trial: Trial, problem: Problem) -> None:
        nonlocal num_runs
        stage.report_progress(f"trial {num_runs + 1}", num_runs, total)
        result = run_variant(ctx, problem, Variant(name, trial.settings))
        num_runs += 1
        path = result_path(ctx.workdir, problem.seed, REFERENCE)
        trial.objectives.append(objective(result, load_result(path)))
        trial.results.append(result)

    settings = candidates(name, getattr(ctx.config, name), trials)
    tried = [Trial(values, [], []) for values in settings]
    configured = tried[0]
    for trial in tried:
        run(trial, problems[0])
    tried.sort(key=lambda trial: trial.objectives[0])
    finalists = tried[:NUM_FINALISTS]
    if configured not in finalists:
        finalists.append(configured)
    for trial in finalists:
        for problem in problems[1:]:
            run(trial, problem)
    stage.report_progress("trials", num_runs, num_runs)
    others = [trial for trial in tried if trial not in finalists]
    finalists.sort(key=lambda trial: float(np.mean(trial.objectives)))
    return [*finalists, *others]


def _build_record(
    config: Config, trials: int, trials_by_method: dict[str, list[Trial]]
) -> dict[str, Any]:
    """Returns the content of `tuning.json`."""
    spaces = {
        name: search_space(name, getattr(config, name)) for name in trials_by_method
    }
    return {
        "config": config.name,
        "seeds": list(config.seeds),
        "trials": trials,
        "commit": source_commit(),
        "objective": " ".join((objective.__doc__ or "").split()),
        "spaces": {
            name: {key: list(range_) for key, range_ in space.items()}
            for name, space in spaces.items()
        },
        "winners": {
            name: tried[0].settings for name, tried in trials_by_method.items()
        },
        "methods": {
            name: [trial.to_json() for trial in tried]
            for name, tried in trials_by_method.items()
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

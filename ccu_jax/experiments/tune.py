"""`--tune TRIALS`: tunes the settings of every method with the same number of trials.

All trials of this random search are scored by the same objective on the unlearn set,
the retain set and the holdout, never on test rows. The first trial is the configuration
itself. It and the best trials of the first seed are repeated on the other seeds; the
trial with the best mean wins.
"""

import dataclasses
import hashlib
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import qmc

from ccu_jax.config import method_defaults as sections
from ccu_jax.config.schema import Config
from ccu_jax.distributed.hosts import is_primary
from ccu_jax.experiments import variants
from ccu_jax.experiments.variants import Settings, open_variants
from ccu_jax.methods import REFERENCE, REFERENCES, Problem
from ccu_jax.models import VIEWS
from ccu_jax.reports.summary import DASH, get_number, get_score
from ccu_jax.reports.tables import Table
from ccu_jax.runs import forecast
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import Stage
from ccu_jax.runs.results import Result, load_result, result_path, source_commit
from ccu_jax.storage.files import write_json

NUM_FINALISTS = 3


class Range(NamedTuple):
    """A search range, sampled uniformly in the value or in its logarithm."""

    low: float
    high: float
    log: bool = True

    def value_at(self, fraction: float) -> float:
        """Returns the value at a fraction in [0, 1] of the range."""
        if self.log:
            return self.low * (self.high / self.low) ** fraction
        return self.low + fraction * (self.high - self.low)


# Ranges are centered on published values. Methods that share a section are searched in
# the same ranges. Other settings stay as configured.
_LEARNING_RATE = Range(1e-4, 2e-3)
_TEMPERATURE = Range(0.07, 0.5)
_TRAINING = {"epochs": Range(1.5, 8), "learning_rate": _LEARNING_RATE}

SPACES: dict[type, dict[str, Range]] = {
    sections.Finetune: _TRAINING,
    sections.L1Sparse: _TRAINING | {"l1_weight": Range(1e-6, 3e-4)},
    sections.GradientAscent: {
        "epochs": Range(1, 12),
        "learning_rate": Range(1e-5, 1e-3),
        "loss_cap": Range(1, 3),
    },
    sections.NegGradPlus: _TRAINING | {"retain_weight": Range(0.5, 0.98, log=False)},
    sections.RandomLabel: _TRAINING | {"unlearn_weight": Range(0.05, 2)},
    sections.LastLayers: {"epochs": Range(3, 40), "learning_rate": Range(5e-4, 1e-2)},
    sections.Scrub: {
        "epochs": Range(2, 6),
        "ascent_epochs": Range(1, 4),
        "learning_rate": Range(2e-4, 3e-3),
        "distill_weight": Range(0.1, 3),
        "task_weight": Range(0.3, 3),
    },
    sections.BadTeacher: {
        "epochs": Range(1, 5),
        "learning_rate": _LEARNING_RATE,
        "unlearn_weight": Range(0.05, 3),
    },
    sections.Delete: {"epochs": Range(1, 20), "learning_rate": Range(1e-5, 1e-3)},
    sections.MultiDelete: {"epochs": Range(1, 6), "learning_rate": _LEARNING_RATE},
    sections.Ssd: {"alpha": Range(1, 100), "lambda_": Range(0.1, 1)},
    sections.SfrOn: {
        "epochs": Range(1, 8),
        "repair_steps": Range(2, 8),
        "learning_rate": _LEARNING_RATE,
        "fisher_threshold": Range(0.3, 10),
        "slow_fraction": Range(0.3, 1),
    },
    sections.Contrastive: {
        "epochs": Range(1, 8),
        "repeats": Range(2, 6),
        "learning_rate": _LEARNING_RATE,
        "temperature": _TEMPERATURE,
        "contrast_weight": Range(0.03, 1),
    },
    sections.CoUn: _TRAINING
    | {"contrast_weight": Range(0.1, 1), "temperature": _TEMPERATURE},
    sections.Ccu: {
        "steps": Range(40, 200),
        "learning_rate": Range(5e-4, 6e-3),
        "inverse_contrast": Range(0.3, 3),
        "pair_dissociation": Range(1, 20),
        "retention": Range(0.3, 8),
    },
    sections.CcuPlus: {
        "steps": Range(80, 200),
        "learning_rate": Range(1e-3, 1e-2),
        "shrink": Range(0.5, 1, log=False),
        "retention": Range(1, 16),
        "heldout_retention": Range(1, 16),
        "pair_dissociation": Range(3, 30),
    },
}
# Further settings of a single method.
METHOD_SPACES: dict[str, dict[str, Range]] = {
    "salun": {"saliency_fraction": Range(0.1, 0.9, log=False)},
    "salun_stop": {"saliency_fraction": Range(0.1, 0.9, log=False)},
    "ccu_gated": {"gated_push": Range(0.3, 6)},
}


def search_space(method: str, section: object) -> dict[str, Range]:
    """Returns the search range of each tuned setting of a method."""
    return SPACES[type(section)] | METHOD_SPACES.get(method, {})


@dataclasses.dataclass(eq=False)
class Trial:
    """The settings of one trial, with the objective and the result of each seed."""

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
    """Tunes all methods of a configuration except the references, on all seeds.

    Each method gets `trials` trials. Returns the content of `tuning.json`.

    Raises UserError if the configuration or the working folder is invalid.
    """
    names = [name for name in config.methods if name not in REFERENCES]
    titles = [f"tune {name}" for name in names]
    method_kind = "method with settings to tune"
    with open_variants(config, workdir, names, method_kind, titles) as (ctx, problems):
        problems = [variants.without_test_rows(problem) for problem in problems]
        num_repeated = (len(problems) - 1) * min(NUM_FINALISTS + 1, trials)
        runs = dict.fromkeys(names, trials + num_repeated)
        ctx.reporter.log(forecast.describe_runs(ctx, runs))
        trials_by_method = {}
        for name, title in zip(names, titles, strict=True):
            with ctx.reporter.stage(title) as stage:
                candidates = draw_candidates(name, getattr(config, name), trials)
                trials_by_method[name] = _tune_method(
                    ctx, problems, name, candidates, runs[name], stage
                )
        path = workdir / "tuning.json"
        record = _build_record(config, trials, trials_by_method)
        if is_primary():
            write_json(path, record)
        _build_table(record).show(ctx.reporter)
        ctx.reporter.log(f"tuned: {path}; its `winners` are the settings to use")
        return record


def draw_candidates(method: str, section: Any, trials: int) -> list[Settings]:
    """Returns the settings of each trial; the first candidate changes nothing.

    The others are a Sobol sequence over the ranges, Owen-scrambled with a seed derived
    from the method's name, so every call returns the same candidates.
    """
    space = search_space(method, section)
    seed = int.from_bytes(hashlib.blake2b(method.encode(), digest_size=4).digest())
    sobol = qmc.Sobol(len(space), rng=np.random.default_rng(seed))
    points = sobol.random_base2(max(0, math.ceil(math.log2(max(trials - 1, 1)))))
    candidates: list[Settings] = [{}]
    for point in points[: trials - 1]:
        settings: Settings = {}
        for (name, range_), fraction in zip(space.items(), point, strict=True):
            value = range_.value_at(float(fraction))
            is_integer = isinstance(getattr(section, name), int)
            settings[name] = round(value) if is_integer else float(f"{value:.4g}")
        candidates.append(settings)
    return candidates


def objective(result: Result, reference: Result) -> float:
    """Returns the distance of a model from the retrained reference; lower is better.

    The mean over attacked views of 2 |AUC - AUC of the reference|, plus the mean over
    views of the score lost on the holdout (a gain is negative), plus the fused score
    lost on the retain set (a gain is zero). Infinite if the model diverged or an AUC is
    missing.
    """
    if result.get("diverged"):
        return math.inf
    leaks = [
        2 * abs(get_number(result, *path) - get_number(reference, *path))
        for path in (("attack_auc", view) for view in variants.ATTACKED_VIEWS)
    ]

    def lost_score(split: str, view: str) -> float:
        before, after = (get_score(r, split, view) for r in (reference, result))
        return (before - after) / 100

    lost = [lost_score("unseen", view) for view in VIEWS]
    total = np.mean(leaks) + np.mean(lost) + max(lost_score("retain", "fused"), 0.0)
    return float(total) if math.isfinite(total) else math.inf


def _tune_method(
    ctx: RunContext,
    problems: list[Problem],
    name: str,
    candidates: list[Settings],
    max_runs: int,
    stage: Stage,
) -> list[Trial]:
    """Runs all trials of a method and returns them, the best first."""
    trials = [Trial(settings, [], []) for settings in candidates]
    configured = trials[0]

    def run(trial: Trial, problem: Problem) -> None:
        num_runs = sum(len(trial.results) for trial in trials)
        stage.report_progress(f"trial {num_runs + 1}", num_runs, max_runs)
        result = variants.run_variant(ctx, problem, name, trial.settings)
        path = result_path(ctx.workdir, problem.seed, REFERENCE)
        trial.objectives.append(objective(result, load_result(path)))
        trial.results.append(result)

    for trial in trials:
        run(trial, problems[0])
    trials.sort(key=lambda trial: trial.objectives[0])
    finalists = trials[:NUM_FINALISTS]
    if configured not in finalists:
        finalists.append(configured)
    for trial in finalists:
        for problem in problems[1:]:
            run(trial, problem)
    stage.report_progress("trials", max_runs, max_runs)
    dropped = [trial for trial in trials if trial not in finalists]
    finalists.sort(key=lambda trial: float(np.mean(trial.objectives)))
    return [*finalists, *dropped]


def _build_record(
    config: Config, num_trials: int, trials: dict[str, list[Trial]]
) -> dict[str, Any]:
    """Returns the content of `tuning.json`; each method's best trial is first."""
    return {
        "config": config.name,
        "seeds": list(config.seeds),
        "trials": num_trials,
        "commit": source_commit(),
        "objective": " ".join((objective.__doc__ or "").split()),
        "spaces": {name: search_space(name, getattr(config, name)) for name in trials},
        "winners": {name: best.settings for name, (best, *_) in trials.items()},
        "methods": {n: [x.to_json() for x in ranking] for n, ranking in trials.items()},
    }


def _build_table(record: dict[str, Any]) -> Table:
    """Builds the table of each method's best trial beside the configured settings."""
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

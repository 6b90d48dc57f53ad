"""`--tune TRIALS`: settings for every method, looked for with the same effort.

As many trials for each method, in ranges that `methods/spaces.py` names, all judged by
the same objective on the same rows: those of the unlearn set, of the retain set, and
`unseen` ones, which no method is given. Test rows are not looked at. The first trial is
the configuration itself. It and the best few of the first seed are run on the other
seeds, too, and the best mean wins.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

import numpy as np

from ccu_jax.config.schema import Config
from ccu_jax.distributed.hosts import is_primary
from ccu_jax.experiments import variants
from ccu_jax.experiments.search_spaces import space
from ccu_jax.experiments.variants import Variant
from ccu_jax.methods import REFERENCE, REFERENCES
from ccu_jax.models import VIEWS
from ccu_jax.reports.summary import get_attack_auc, get_score
from ccu_jax.reports.tables import Table
from ccu_jax.runs import forecast, session, stages
from ccu_jax.runs import results as rows
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import Reporter
from ccu_jax.storage.files import write_atomically

FINALISTS = 3
ATTACKED = ("image", "fused", "pair")


def tune(config: Config, workdir: pathlib.Path, trials: int) -> dict[str, Any]:
    """Look for settings; what is found stands in `tuning.json` and on the screen.

    Args:
        config: its `seeds` are those to tune on, its `methods` are tuned, beside the
            references.
        workdir: of a run of this configuration.
        trials: for each method.

    Returns:
        What `tuning.json` holds.
    """
    names = [name for name in config.methods if name not in REFERENCES]
    variants.check(config, names, "one with settings to look for")
    given = dataclasses.replace(config, methods=("original", REFERENCE))
    titles = [f"tune {name}" for name in names]
    looks = {seed: f"seed {seed}: features" for seed in config.seeds}
    plan = [*looks.values(), *titles, "tuned"]
    with session.open_run(given, workdir, plan) as (ctx, drawn, methods):
        variants.check_there(ctx)
        for seed, sets in drawn.items():
            stages.run_seed(ctx, seed, sets, methods)
        problems = []
        for seed, sets in drawn.items():
            with ctx.reporter.stage(looks[seed]) as stage:
                problem = stages.problem_with_original(ctx, seed, sets, stage)
            problems.append(variants.without_test(problem))
        references = [_reference(ctx, problem) for problem in problems]
        runs = _runs(trials, len(problems))
        ctx.reporter.log(forecast.describe_variants(ctx, dict.fromkeys(names, runs)))
        found = {}
        for name, title in zip(names, titles, strict=True):
            with ctx.reporter.stage(title) as stage:
                found[name] = _method(ctx, problems, references, name, trials, stage)
        with ctx.reporter.stage("tuned"):
            told = _told(config, trials, found)
            if is_primary():
                path = workdir / "tuning.json"
                write_atomically(path, (json.dumps(told, indent=1) + "\n").encode())
        _show(ctx.reporter, told, workdir / "tuning.json")
        return told


def candidates(method: str, section: Any, trials: int) -> list[dict[str, Any]]:
    """Settings to try: the section itself, then places spread evenly over its ranges.

    A Sobol sequence (Owen-scrambled by the method's name), the same at every call.
    """
    from scipy.stats import qmc

    ranges = space(method, section)
    seed = int.from_bytes(hashlib.blake2b(method.encode(), digest_size=4).digest())
    sobol = qmc.Sobol(len(ranges), rng=np.random.default_rng(seed))
    points = sobol.random_base2(max(0, math.ceil(math.log2(max(trials - 1, 1)))))
    found: list[dict[str, Any]] = [{}]
    for point in points[: trials - 1]:
        settings = {}
        for (name, of), share in zip(ranges.items(), point, strict=True):
            value = of.at(float(share))
            whole = isinstance(getattr(section, name), int)
            settings[name] = round(value) if whole else float(f"{value:.4g}")
        found.append(settings)
    return found


def objective(row: dict[str, Any], reference: dict[str, Any]) -> float:
    """How far a model is from the reference: 0 is as good, the less the better.

    The mean over attacked views of what the attack knows more or less (2 |AUC - its|),
    plus the mean over views of what is lost on unseen rows (a gain counts, too), plus
    what is lost on the retain set. Infinite for a model that says no numbers.
    """
    if row.get("diverged"):
        return math.inf
    told = [
        2 * abs(get_attack_auc(row, view) - get_attack_auc(reference, view))
        for view in ATTACKED
    ]

    def lost(where, view):
        return (get_score(reference, where, view) - get_score(row, where, view)) / 100

    unseen = [lost("unseen", view) for view in VIEWS]
    total = np.mean(told) + np.mean(unseen) + max(lost("retain", "fused"), 0.0)
    return float(total) if math.isfinite(total) else math.inf


def _reference(ctx: RunContext, problem):
    """The reference's row."""
    return rows.load_result(rows.result_path(ctx.workdir, problem.seed, REFERENCE))


def _method(ctx: RunContext, problems, references, name, trials, stage):
    """All trials of a method, the best first."""
    section = getattr(ctx.config, name)
    settings = candidates(name, section, trials)
    seeds = len(problems)
    total, done = _runs(trials, seeds), 0

    def judged(place, values):
        nonlocal done
        stage.report_progress(f"trial {done + 1}", done, total)
        row = variants.run(ctx, problems[place], Variant(name, values))
        done += 1
        return objective(row, references[place]), row

    found = []
    for values in settings:
        value, row = judged(0, values)
        found.append({"settings": values, "objectives": [value], "rows": [row]})
    configured = found[0]
    found.sort(key=lambda trial: trial["objectives"][0])
    finals = found[:FINALISTS]
    if configured not in finals:
        finals.append(configured)
    for trial in finals:
        for place in range(1, seeds):
            value, row = judged(place, trial["settings"])
            trial["objectives"].append(value)
            trial["rows"].append(row)
    stage.report_progress("trials", done, done)
    rest = [trial for trial in found if trial not in finals]
    return [*sorted(finals, key=lambda trial: np.mean(trial["objectives"])), *rest]


def _runs(trials, seeds):
    """How many runs there are at most: trials, and the finals on the other seeds."""
    return trials + (seeds - 1) * min(FINALISTS + 1, trials)


def _told(config, trials, found):
    def short(trial):
        seconds = [row["seconds"]["unlearn"] for row in trial["rows"]]
        return {
            "settings": trial["settings"],
            "objectives": [
                x if math.isfinite(x) else None for x in trial["objectives"]
            ],
            "seconds": float(np.mean(seconds)),
            "diverged": trial["rows"][0]["diverged"],
        }

    return {
        "config": config.name,
        "seeds": list(config.seeds),
        "trials": trials,
        "commit": rows.source_commit(),
        "objective": " ".join((objective.__doc__ or "").split()),
        "spaces": {
            name: {
                key: list(of) for key, of in space(name, getattr(config, name)).items()
            }
            for name in found
        },
        "winners": {name: each[0]["settings"] for name, each in found.items()},
        "methods": {name: [short(t) for t in each] for name, each in found.items()},
    }


def _show(reporter: Reporter, told, path) -> None:
    header = ["method", "objective", "as configured", "seconds", "settings"]
    lines = []
    for name, trials in told["methods"].items():
        best = trials[0]
        plain = next(t for t in trials if not t["settings"])
        lines.append(
            [
                name,
                _mean(best["objectives"]),
                _mean(plain["objectives"]),
                f"{best['seconds']:.2f}",
                ", ".join(f"{k}={v:g}" for k, v in best["settings"].items()) or "as is",
            ]
        )
    Table(header, lines).show(reporter)
    reporter.log(f"tuned: {path}; `winners` of it are settings to adopt")


def _mean(values) -> str:
    return "–" if None in values else f"{np.mean(values):.3f}"

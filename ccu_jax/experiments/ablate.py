"""`--ablate`: measures the contribution of each term of this project's methods.

Every variant of CCU runs as configured, and again with each of its losses or other
terms switched off or changed, always starting from the same original models.
"""

import pathlib
from collections.abc import Iterator

from ccu_jax.config.method_defaults import Ccu, CcuPlus
from ccu_jax.config.schema import Config
from ccu_jax.distributed.hosts import is_primary
from ccu_jax.experiments import variants
from ccu_jax.experiments.variants import Settings, open_variants
from ccu_jax.methods import OURS, REFERENCE, Problem
from ccu_jax.reports.findings import EDITION_WARNINGS
from ccu_jax.reports.summary import DASH, MethodResults, format_estimate
from ccu_jax.reports.tables import Table
from ccu_jax.runs import forecast
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import Stage
from ccu_jax.runs.results import Result, load_result, result_path
from ccu_jax.storage.files import write_atomically, write_json

# The changed settings of each ablation, by section of the configuration and name.
# `steps` is a multiple of the configured number.
ABLATIONS: dict[type, dict[str, Settings]] = {
    Ccu: {
        "no inverse contrast": {"inverse_contrast": 0.0},
        "with a pull to other classes": {"pull": 1.0},
        "no pair dissociation": {"pair_dissociation": 0.0},
        "no retention": {"retention": 0.0},
        "no separation": {"separation": 0.0},
    },
    CcuPlus: {
        "no target match": {"target_match": 0.0},
        "no confidence match": {"match_confidence": 0.0},
        "no target and no confidence match": {
            "target_match": 0.0,
            "match_confidence": 0.0,
        },
        "no gated push": {"gated_push": 0.0},
        "no task loss": {"task_loss": 0.0},
        "no retention": {"retention": 0.0},
        "no held-out retention": {"heldout_retention": 0.0},
        "no pair dissociation": {"pair_dissociation": 0.0},
        "no separation": {"separation": 0.0},
        "no correction of targets": {"feedback_gain": 0.0},
        "targets never refreshed": {"refresh_every": 1_000_000},
        "shrunken tail": {"shrink": 0.5},
        "whole tail": {"shrink": 1.0},
        "400 retain rows": {"max_retain_rows": 400},
        "half the steps": {"steps": 0.5},
    },
}
AS_CONFIGURED = "as configured"
_SCORES = ("unlearn image", "test image", "test text", "test fused", "retain fused")


def select_ablations(section: Ccu | CcuPlus) -> dict[str, Settings]:
    """Returns the settings that each ablation changes, by the ablation's name.

    Ablations that equal `section` are omitted; the first, "as configured", is empty.
    """
    settings_by_name: dict[str, Settings] = {AS_CONFIGURED: {}}
    for name, settings in ABLATIONS[type(section)].items():
        if "steps" in settings:
            settings = {"steps": max(round(settings["steps"] * section.steps), 1)}
        if any(getattr(section, key) != value for key, value in settings.items()):
            settings_by_name[name] = settings
    return settings_by_name


def ablate(config: Config, workdir: pathlib.Path) -> list[Result]:
    """Ablates the variants of CCU among `config.methods` on all seeds.

    Returns the content of `ablation.json`, which is also printed as tables.

    Raises UserError if the configuration or the working folder is invalid.
    """
    names = [name for name in config.methods if name in OURS]
    method_kind = f"variant of CCU ({', '.join(OURS)})"
    titles = [_stage_title(seed, name) for seed in config.seeds for name in names]
    results: list[Result] = []
    with open_variants(config, workdir, names, method_kind, titles) as (ctx, problems):
        num_seeds = len(problems)
        runs = {n: num_seeds * len(select_ablations(getattr(config, n))) for n in names}
        ctx.reporter.log(forecast.describe_runs(ctx, runs, recompile=True))
        for problem in problems:
            reference = load_result(result_path(workdir, problem.seed, REFERENCE))
            results.append({**reference, "ablation": REFERENCE})
            for name in names:
                with ctx.reporter.stage(_stage_title(problem.seed, name)) as stage:
                    results += _ablate_method(ctx, problem, name, stage)
        tables = {
            f"{name}: ablations ({DASH}: not measured)": build_table(results, name)
            for name in names
        }
        if is_primary():
            write_json(workdir / "ablation.json", results)
            warning = EDITION_WARNINGS.get(ctx.data.edition)
            blocks = [f"**{warning}**"] if warning else []
            for title, table in tables.items():
                blocks += [f"## {title}", table.to_markdown()]
            text = "\n\n".join(blocks) + "\n"
            write_atomically(workdir / "ablation.md", text.encode())
        for title, table in tables.items():
            ctx.reporter.log(title)
            table.show(ctx.reporter)
        ctx.reporter.log(f"ablation: {workdir / 'ablation.json'}, ablation.md")
    return results


def _stage_title(seed: int, method: str) -> str:
    return f"seed {seed}: ablate {method}"


def _ablate_method(
    ctx: RunContext, problem: Problem, method: str, stage: Stage
) -> Iterator[Result]:
    """Runs all ablations of a method and yields their results."""
    settings_by_name = select_ablations(getattr(problem.config, method))
    total = len(settings_by_name)
    for number, (name, settings) in enumerate(settings_by_name.items()):
        stage.report_progress(name, number, total)
        result = variants.run_variant(ctx, problem, method, settings)
        yield {**result, "ablation": name}
    stage.report_progress("done", total, total)


def build_table(results: list[Result], method: str) -> Table:
    """Builds a method's table: one row per ablation, means over seeds."""
    groups: dict[str, MethodResults] = {}
    for result in results:
        if result["method"] in (REFERENCE, method):
            group = groups.setdefault(result["ablation"], MethodResults())
            group.rows[str(result["seed"])] = result
    return Table.from_cells([_format_row(*item) for item in groups.items()])


def _format_row(ablation: str, group: MethodResults) -> dict[str, str]:
    num_diverged = len(group.divergence_reasons())
    name = f"{ablation} (diverged: {num_diverged})" if num_diverged else ablation
    cells = {"ablation": name, "seconds": format_estimate(group.mean_time_s())}
    for title in _SCORES:
        split, view = title.split()
        cells[title] = format_estimate(group.mean_score(split, view), 1)
    for view in variants.ATTACKED_VIEWS:
        cells[f"attack AUC {view}"] = format_estimate(group.mean_attack_auc(view), 3)
    return cells

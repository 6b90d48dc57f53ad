"""`--ablate`: what each part of the methods of this project is worth.

Every form of CCU runs as it is, and once more without each of its objectives or with
another part switched off, from the same originals.
"""

import dataclasses
import json
import pathlib
from typing import Any

from ccu_jax.config.methods import Ccu, CcuPlus
from ccu_jax.config.schema import Config
from ccu_jax.distributed.hosts import is_primary
from ccu_jax.experiments import variants
from ccu_jax.experiments.variants import Variant
from ccu_jax.methods import OURS, REFERENCE
from ccu_jax.reports.findings import EDITION_WARNINGS
from ccu_jax.reports.summary import (
    DASH,
    estimate,
    format_estimate,
    get_attack_auc,
    get_score,
    get_time_s,
)
from ccu_jax.reports.tables import Table
from ccu_jax.runs import forecast, session, stages
from ccu_jax.runs import results as rows
from ccu_jax.runs.context import RunContext
from ccu_jax.storage.files import write_atomically

# What can be switched off, or changed, in each kind of section, and in what words.
PARTS: dict[type, dict[str, dict[str, Any]]] = {
    Ccu: {
        "no inverse contrast": {"inverse_contrast": 0.0},
        "with a pull to other classes": {"pull": 1.0},
        "no pair dissociation": {"pair_dissociation": 0.0},
        "no retention": {"retention": 0.0},
        "no separation": {"separation": 0.0},
    },
    CcuPlus: {
        "no match": {"target_match": 0.0},
        "no level": {"match_confidence": 0.0},
        "neither match nor level": {"target_match": 0.0, "match_confidence": 0.0},
        "no gated contrast": {"gated_push": 0.0},
        "no task loss": {"task_loss": 0.0},
        "no retention": {"retention": 0.0},
        "no hold": {"heldout_retention": 0.0},
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
_COLUMNS = ("unlearn image", "test image", "test text", "test fused", "retain fused")
_ATTACKS = ("image", "fused", "pair")


def parts(section: Any) -> dict[str, dict[str, Any]]:
    """What is changed in a section, leaving out what would change nothing."""
    found = {"as it is": {}}
    for name, changes in PARTS[type(section)].items():
        if "steps" in changes:
            changes = {"steps": max(round(changes["steps"] * section.steps), 1)}
        if any(getattr(section, key) != value for key, value in changes.items()):
            found[name] = changes
    return found


def ablate(config: Config, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Run every part of the forms of CCU that `config.methods` names.

    Args:
        config: what to do; all its seeds are run.
        workdir: of a run of this configuration.

    Returns:
        The rows of `ablation.json`.
    """
    names = [name for name in config.methods if name in OURS]
    variants.check(config, names, f"a form of CCU ({', '.join(OURS)})")
    given = dataclasses.replace(config, methods=("original", REFERENCE))
    titles = [f"seed {seed}: ablate {n}" for seed in config.seeds for n in names]
    found: list[dict[str, Any]] = []
    with session.open_run(given, workdir, titles) as (ctx, drawn, methods):
        variants.check_there(ctx)
        runs = {name: len(drawn) * len(parts(getattr(config, name))) for name in names}
        ctx.reporter.log(forecast.describe_variants(ctx, runs, recompile=True))
        for seed, sets in drawn.items():
            stages.run_seed(ctx, seed, sets, methods)
            reference = rows.load_result(rows.result_path(workdir, seed, REFERENCE))
            found.append({**reference, "part": REFERENCE})
            for name in names:
                with ctx.reporter.stage(f"seed {seed}: ablate {name}") as stage:
                    problem = stages.problem_with_original(ctx, seed, sets, stage)
                    found += _method(ctx, problem, name, stage)
        if is_primary():
            text = json.dumps(found, indent=1) + "\n"
            write_atomically(workdir / "ablation.json", text.encode())
            write_atomically(workdir / "ablation.md", _markdown(found, names).encode())
        for name in names:
            ctx.reporter.log(_title(name))
            Table(*table(found, name)).show(ctx.reporter)
        ctx.reporter.log(f"ablation: {workdir / 'ablation.json'}, ablation.md")
    return found


def _method(ctx: RunContext, problem, name, stage):
    changes = parts(getattr(problem.config, name))
    for place, (part, settings) in enumerate(changes.items()):
        stage.report_progress(part, place, len(changes))
        row = variants.run(ctx, problem, Variant(name, settings))
        yield {**row, "part": part}
    stage.report_progress("done", len(changes), len(changes))


def table(found: list[dict[str, Any]], name: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines for one method: the reference, then its parts."""
    header = ["part", "seconds", *_COLUMNS, *(f"attack AUC {v}" for v in _ATTACKS)]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        if row["method"] in (REFERENCE, name):
            groups.setdefault(row["part"], []).append(row)
    lines = []
    for part, group in groups.items():
        cells = [part, format_estimate(estimate([get_time_s(r) for r in group]))]
        for column in _COLUMNS:
            where, view = column.split()
            values = [get_score(r, where, view) for r in group]
            cells.append(format_estimate(estimate(values), 1))
        for view in _ATTACKS:
            cells.append(
                format_estimate(estimate([get_attack_auc(r, view) for r in group]), 3)
            )
        failed = sum(bool(row.get("diverged")) for row in group)
        lines.append([f"{part} (diverged: {failed})" if failed else part, *cells[1:]])
    return header, lines


def _title(name):
    return f"{name}: what its parts are worth ({DASH} is not measured)"


def _markdown(found, names):
    loud = dict.fromkeys(row.get("edition") for row in found)
    told = [
        f"**{EDITION_WARNINGS[name]}**" for name in loud if name in EDITION_WARNINGS
    ]
    for name in names:
        told += [f"## {_title(name)}", Table(*table(found, name)).to_markdown()]
    return "\n\n".join(told) + "\n"

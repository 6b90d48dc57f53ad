"""Runs a configuration: all methods of all seeds, the audit and the report.

Training the original, retraining the references and running an unlearning method are
stages of the same kind. A finished stage is skipped. An interrupted stage resumes from
its last checkpoint, and its result is bit-identical to that of an uninterrupted one.
"""

import dataclasses
import pathlib
from typing import Any

from ccu_jax.audits import tiers
from ccu_jax.audits.records import collect_records, write_audit
from ccu_jax.config.schema import Config, to_json
from ccu_jax.distributed.hosts import is_primary
from ccu_jax.reports import audit_table, report
from ccu_jax.runs import stages
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.purge import purge_workdir
from ccu_jax.runs.results import load_all_results
from ccu_jax.runs.session import open_run


def run(
    config: Config,
    workdir: pathlib.Path,
    purge: bool = False,
    audit: str = "smoke",
    shadows: int = 16,
) -> list[dict[str, Any]]:
    """Runs and audits all methods of a configuration on all seeds; writes the report.

    Args:
        config: the data, the unlearn set, the methods and the seeds.
        workdir: the working folder, new or from an earlier run of `config`.
        purge: whether to remove the unlearned images from the folder at the end.
        audit: the tier of the audit, see `audits/tiers.py`.
        shadows: number of shadow models for the tier "rigorous".

    Returns:
        The content of `results.json`: one record per method and seed, including those
        of earlier runs in this folder.

    Raises UserError if the configuration is invalid, or the working folder is damaged.
    """
    methods = tiers.list_required_methods(audit, ["original", *config.methods])
    titles = [*tiers.list_stage_titles(audit, config.seeds), "report"]
    titles += ["purge"] if purge else []
    tiers.check_tier(config, audit)
    extended = dataclasses.replace(config, methods=tuple(methods))
    with open_run(extended, workdir, titles) as (ctx, sets_by_seed):
        if message := tiers.describe_duration(ctx, audit, methods, shadows):
            ctx.reporter.log(message)
        for seed, sets in sets_by_seed.items():
            stages.run_seed(ctx, seed, sets, methods)
        if audit != "none":
            tiers.check_outputs(ctx, methods)
        for seed, sets in sets_by_seed.items():
            tiers.audit_models(ctx, seed, sets, methods, audit, shadows)
        results = _report(ctx, config, audit)
        if purge:
            purge_workdir(ctx)
        return results


def _report(ctx: RunContext, config: Config, audit: str) -> list[dict[str, Any]]:
    """Writes and prints the report; returns the content of `results.json`."""
    workdir, reporter = ctx.workdir, ctx.reporter
    results = load_all_results(workdir)
    with reporter.stage("report") as stage:
        # First without the audit, so that a failing audit leaves a report.
        if is_primary():
            report.write_report(workdir, results, to_json(config))
        if audit == "none":  # only shows the records of earlier runs
            audits = collect_records(workdir)
        else:
            audits = write_audit(workdir, stage.report_progress)
            if is_primary() and audits:
                audit_table.write(workdir, audits)
        if is_primary() and audits:
            report.write_report(workdir, results, to_json(config), audits)
    report.show(results, reporter)
    if audit != "none" and audits:
        audit_table.show(workdir, audits, reporter)
    reporter.log(f"report: {workdir / 'report.html'}")
    return results

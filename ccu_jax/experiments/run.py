"""A whole run: its folder, its stages, its report.

Training the original, the retrained references and every unlearning method are stages
of the same kind. A finished stage is skipped; one that was cut off goes on from its
last checkpoint and ends with the same bits.
"""

import dataclasses
import pathlib
from typing import Any

from ccu_jax.audits import tiers as auditing
from ccu_jax.config.schema import Config, to_json
from ccu_jax.distributed.hosts import is_primary
from ccu_jax.reports import audit_table
from ccu_jax.reports import html as report
from ccu_jax.runs import results as rows
from ccu_jax.runs import stages
from ccu_jax.runs import workdir as workdirs
from ccu_jax.runs.session import open_run


def run(
    config: Config,
    workdir: pathlib.Path,
    purge: bool = False,
    audit: str = "smoke",
    shadows: int = 16,
) -> list[dict[str, Any]]:
    """Run everything that a configuration asks for and write the report.

    Args:
        config: what to do.
        workdir: a folder of this configuration, new or from an earlier run.
        purge: whether the forgotten pictures are then removed from the folder.
        audit: a tier, see `auditing.py`.
        shadows: size of the pool of its last tier.

    Returns:
        The rows of `results.json`: one per method and seed, earlier ones included.

    Raises:
        UserError: what the user can mend.
    """
    given = dataclasses.replace(
        config, methods=tuple(auditing.needed(audit, ["original", *config.methods]))
    )
    titles = [*auditing.titles(audit, config.seeds), "report"]
    titles += ["purge"] if purge else []
    auditing.check(config, audit)
    with open_run(given, workdir, titles) as (ctx, drawn, methods):
        reporter = ctx.reporter
        if told := auditing.forecast_of(ctx, audit, methods, shadows):
            reporter.log(told)
        for seed, sets in drawn.items():
            stages.run_seed(ctx, seed, sets, methods)
        if audit != "none":
            auditing.readable(ctx, methods)
        for seed, sets in drawn.items():
            auditing.measure(ctx, seed, sets, methods, audit, shadows)
        with reporter.stage("report") as stage:
            found = rows.load_all_results(workdir)
            given = to_json(config)
            if is_primary():
                report.write(workdir, found, given)
            # Whatever becomes of the audit: what was done before is reported.
            if audit == "none":
                audited = auditing.stored(workdir)
            else:
                audited = auditing.write(ctx, stage.report_progress)
            if is_primary() and audited:
                if audit != "none":
                    audit_table.write(workdir, audited)
                report.write(workdir, found, given, audited)
        report.show(found, reporter)
        if audit != "none" and audited:
            audit_table.show(workdir, audited, reporter)
        reporter.log(f"report: {workdir / 'report.html'}")
        if purge:
            workdirs.purge(ctx)
        return found

"""The audit table, with the verdict and the measurements of each method."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ccu_jax.audits.offline import VERDICT_SIGNALS
from ccu_jax.audits.verdict import format_interval, seeds_share_rows
from ccu_jax.methods import CONTROL, REFERENCE
from ccu_jax.metrics.intervals import Interval, mean_over_seeds
from ccu_jax.reports.findings import EDITION_WARNINGS
from ccu_jax.reports.summary import DASH, get_value
from ccu_jax.reports.tables import Table, escape_markdown
from ccu_jax.runs.progress import Reporter
from ccu_jax.storage.files import write_atomically

_LEGEND = pathlib.Path(__file__).with_name("audit_legend.txt").read_text("utf-8")
LEGEND = " ".join(_LEGEND.split()).format(reference=REFERENCE, control=CONTROL)


def write(workdir: pathlib.Path, methods: Sequence[dict[str, Any]]) -> None:
    """Writes audit.md from the output of `collect_records`."""
    write_atomically(workdir / "audit.md", to_markdown(methods).encode())


def show(
    workdir: pathlib.Path, methods: Sequence[dict[str, Any]], reporter: Reporter
) -> None:
    """Prints the table and the paths of audit.md and audit.json."""
    reporter.log("audit: verdicts and measurements, with confidence intervals")
    make_table(methods).show(reporter, num_fixed=2)
    reporter.log(f"audit: {workdir / 'audit.md'}, audit.json")


def make_table(methods: Sequence[dict[str, Any]]) -> Table:
    """Builds the table and omits columns in which no method has a value."""
    rows = [_format_row(method) for method in methods]
    titles = [x for x in rows[0] if any(row[x] != DASH for row in rows)]
    return Table.from_cells([{title: row[title] for title in titles} for row in rows])


def to_markdown(methods: Sequence[dict[str, Any]]) -> str:
    """Formats the table, its legend and the sentences of all verdicts as Markdown."""
    editions = dict.fromkeys(method["edition"] for method in methods)
    warnings = [EDITION_WARNINGS[x] for x in editions if x in EDITION_WARNINGS]
    sentences = [
        f"- **{method['method']}**: {escape_markdown(method['verdict']['sentence'])}"
        for method in methods
    ]
    paragraphs = [
        "# Audit",
        *(f"**{warning}**" for warning in warnings),
        make_table(methods).to_markdown(),
        LEGEND,
        _describe_costs(methods),
        "\n".join(sentences),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _format_row(method: dict[str, Any]) -> dict[str, str]:
    """Returns the cells of a method by column title."""
    seeds, verdict = method["seeds"], method["verdict"]
    is_shared = seeds_share_rows(seeds)

    def mean(*path: str, spec: str = ".3f", bounds: tuple = (0, 1)) -> str:
        values = [get_value(record, *path) for record in seeds]
        return _format_mean(values, spec, has_shared_rows=is_shared, bounds=bounds)

    def pool(*path: str, spec: str = ".3f") -> str:
        return mean("pool", "image", *path, spec=spec)

    differences = {
        view: format_interval(verdict["differences"][view]) or DASH
        for view in VERDICT_SIGNALS
    }
    masked = mean("neutral", "difference", spec="+.3f", bounds=(-1, 1))
    differences["text masked"] = masked
    num_shadows = {get_value(record, "pool", "image", "shadows") for record in seeds}
    return {
        "method": method["method"],
        "verdict": verdict["word"],
        **{f"Δ AUC vs {REFERENCE}, {x}": text for x, text in differences.items()},
        "ε lower bound, image": mean("epsilon", "image", spec=".2f"),
        "ε lower bound, pair": mean("epsilon", "pair", spec=".2f"),
        "average gap": mean("gaps", "average_gap", spec=".1f", bounds=(0, 100)),
        "ToW": mean("gaps", "tug_of_war"),
        "JS divergence": mean("distances", "unlearn", "image", "js_divergence"),
        "CKA": mean("cka", "reference", "image", bounds=(-1, 1)),
        "intra-class similarity": mean("within_class", "original", bounds=(-1, 1)),
        "scatter ratio": mean("scatter", spec=".2f", bounds=(0, np.inf)),
        "relearning steps": _format_relearning_steps(seeds),
        "LiRA AUC": pool("lira", "auc"),
        "RMIA AUC": pool("rmia", "auc"),
        "U-LiRA AUC": pool("ulira", "auc"),
        "U-LiRA TPR @ 1 % FPR": pool("ulira", "tpr_1"),
        "U-LiRA TPR @ 0.1 % FPR": pool("ulira", "tpr_01"),
        "U-LiRA AUC, this model": pool("ulira_of", "model", "auc"),
        f"U-LiRA AUC, {REFERENCE}": pool("ulira_of", REFERENCE, "auc"),
        f"U-LiRA AUC, {CONTROL}": pool("ulira_of", CONTROL, "auc"),
        "forgetting score": pool("forgetting_score", "score"),
        "forgetting score, control": pool("forgetting_score", "control"),
        "one-run ε": pool("one_run", "epsilon", spec=".2f"),
        "one-run ε, control": pool("one_run_control", "epsilon", spec=".2f"),
        "shadow models": ", ".join(map(str, sorted(num_shadows - {None}))) or DASH,
        "wall time (s)": _format_wall_time(seeds),
    }


def _format_mean(values: list, spec: str, **kwargs: Any) -> str:
    """Formats the mean over seeds, with an interval if all values have one."""
    measured = [x for x in values if x is not None]
    if not measured:
        return DASH
    if all(isinstance(x, list) for x in measured):
        interval = mean_over_seeds([Interval(*x) for x in measured], **kwargs)
        text = format_interval(interval, spec) or DASH
    else:
        text = format(float(np.mean(measured)), spec)
    if len(measured) < len(values):
        text += f", {len(measured)} of {len(values)} seeds"
    return text


def _format_relearning_steps(seeds: list[dict[str, Any]]) -> str:
    """Formats the relearning steps, averaged over seeds, as "30 (20 to > 100)"."""
    records = [record["relearning"] for record in seeds if record.get("relearning")]
    if not records:
        return DASH
    if reasons := [record["diverged"] for record in records if record["diverged"]]:
        return f"diverged ({reasons[0]})"

    def mean(name: str) -> str:
        steps = [record[name] for record in records]
        limit = max(record["limit"] for record in records)
        return f"> {limit}" if None in steps else f"{np.mean(steps):.0f}"

    low, high = mean("min_steps"), mean("max_steps")
    return mean("steps") + ("" if low == high else f" ({low} to {high})")


def _format_wall_time(seeds: list[dict[str, Any]]) -> str:
    """Formats the total seconds over seeds; training shadow models is listed apart."""
    seconds = sum(sum(record["seconds"].values()) for record in seeds)
    shadows = sum(record["costs_s"].get("shadow models", 0.0) for record in seeds)
    return f"{seconds:.1f}" + (f" + {shadows:.0f} for shadow models" if shadows else "")


def _describe_costs(methods: Sequence[dict[str, Any]]) -> str:
    """Lists the total time of each measurement and the Git commits of the models."""
    records = [record for method in methods for record in method["seeds"]]
    total: dict[str, float] = {}
    for record in records:
        for name, seconds in record["costs_s"].items():
            total[name] = total.get(name, 0.0) + seconds
    costs = ", ".join(f"{n.replace('_', ' ')} {s:.1f}" for n, s in total.items())
    text = f"Wall time (s) over all methods and seeds: {costs}."
    commits = {str(record["commit"]) for record in records if record.get("commit")}
    return f"{text} Models of commit {', '.join(sorted(commits))}." if commits else text

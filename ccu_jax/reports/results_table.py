"""The results table and its findings, as Markdown and on a terminal."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from ccu_jax.evaluate.predictions import SPLITS
from ccu_jax.methods import REFERENCE
from ccu_jax.models import VIEWS, VISUAL
from ccu_jax.reports.findings import collect_findings, edition_findings
from ccu_jax.reports.summary import (
    DASH,
    MethodResults,
    Row,
    best_baseline,
    by_method,
    format_estimate,
)
from ccu_jax.reports.tables import Table, escape_markdown
from ccu_jax.runs.progress import Reporter
from ccu_jax.storage.files import to_plain_json

REQUESTS_TITLE = "Sequential requests"
_PHASES = ("start", "steps", "unlearn", "compile", "evaluate", "total")
_ATTACKS = ("image", "fused", "text", "pair", "white")
_SCORES = (*itertools.product(("test", "unlearn"), VIEWS), ("retain", "fused"))


def markdown(rows: list[Row]) -> str:
    """Returns tables and findings as Markdown."""
    rows = to_plain_json(rows)
    warnings = [x.text for x in edition_findings(rows) if x.kind == "warning"]
    paragraphs = [f"# {escape_markdown(title(rows))}"]
    paragraphs += [f"**{escape_markdown(text)}**" for text in warnings]
    if rows:
        paragraphs.append(method_table(rows).to_markdown())
    requests = request_table(rows)
    if requests.rows:
        paragraphs += [f"## {REQUESTS_TITLE}", requests.to_markdown()]
    items = []
    for finding in collect_findings(rows):
        text = escape_markdown(finding.text)
        is_bold = finding.kind in ("warning", "failed")
        items.append(f"- **{text}**" if is_bold else f"- {text}")
    return "\n\n".join([*paragraphs, "\n".join(items)]) + "\n"


def show(rows: list[Row], reporter: Reporter) -> None:
    """Prints tables and findings; as Markdown if the output is a log file."""
    if not reporter.is_active:
        return
    if not reporter.is_live:
        return reporter.print(markdown(rows))
    rows = to_plain_json(rows)
    reporter.print(title(rows), style="bold")
    method_table(rows).show(reporter)
    requests = request_table(rows)
    if requests.rows:
        reporter.print(REQUESTS_TITLE, style="bold")
        requests.show(reporter, num_fixed=2)
    styles = {
        "warning": "bold black on yellow",
        "passed": "green",
        "failed": "bold red",
    }
    for finding in collect_findings(rows):
        reporter.print(finding.text, style=styles.get(finding.kind, ""))


def title(rows: Sequence[Row]) -> str:
    """Returns the names of configuration, edition and metric."""

    def values(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row.get(key, DASH)) for row in rows)) or DASH

    return f"{values('config')} ({values('edition')}), {values('metric')} in %"


def method_table(rows: Sequence[Row]) -> Table:
    """Returns the main table, one row per method."""
    groups = by_method(rows)
    baseline = best_baseline(groups)

    def cells(name: str, group: MethodResults) -> dict[str, str]:
        percent = group.time_percent(groups.get(REFERENCE, MethodResults()))
        times = {"time (s)": group.time_s(), f"time (% of {REFERENCE})": percent}
        if baseline:
            percent = group.time_percent(groups[baseline])
            times[f"time (% of {baseline}, best baseline)"] = percent
        if name == "original":  # its training time is a finding
            time_cells = dict.fromkeys(times, DASH)
        else:
            time_cells = {key: format_estimate(time) for key, time in times.items()}
        return {
            "method": name + (" (diverged)" if group.divergences() else ""),
            **time_cells,
            **_score_cells(group, _SCORES),
        }

    return Table.from_cells([cells(name, group) for name, group in groups.items()])


def seed_table(rows: Sequence[Row]) -> Table:
    """Returns the detailed table, one row per method and seed."""

    def cells(name: str, seed: str, row: Row) -> dict[str, str]:
        group = MethodResults({seed: row})
        unlearn_set = row.get("unlearn_set")
        unlearn_set = unlearn_set if isinstance(unlearn_set, dict) else {}
        return {
            "method": name,
            "seed": seed,
            **{
                f"{x} (s)": format_estimate(group.number("seconds", x)) for x in _PHASES
            },
            **_score_cells(group, itertools.product(SPLITS, VIEWS)),
            "diverged": _text(row.get("diverged")),
            "unlearn rule": _text(unlearn_set.get("rule")),
            "count": _text(unlearn_set.get("count")),
            "commit": _text(row.get("commit")),
        }

    return Table.from_cells(
        [
            cells(name, seed, row)
            for name, group in by_method(rows).items()
            for seed, row in group.rows.items()
        ]
    )


def request_table(rows: Sequence[Row]) -> Table:
    """Returns the table of unlearning requests, one row per method and request."""
    groups = by_method(rows)
    reference = groups.get(REFERENCE, MethodResults())
    # On the images of all requests so far, and on those of the first request.
    attacks = {
        f"attack AUC {view}, {name}": ("attack_auc", key, view)
        for key, name in (("all", "all requests"), ("first", "first request"))
        for view in VISUAL
    }

    def cells(name: str, number: int, request: MethodResults) -> dict[str, str]:
        return {
            "method": name,
            "request": str(number),
            "rows": format_estimate(request.number("count"), 0),
            "time (s)": format_estimate(request.time_s()),
            f"time (% of {REFERENCE})": format_estimate(
                request.time_percent(reference)
            ),
            **{
                key: format_estimate(request.number(*path), 3)
                for key, path in attacks.items()
            },
            "test fused": format_estimate(request.score("test", "fused"), 1),
        }

    return Table.from_cells(
        [
            cells(name, number, request)
            for name, group in groups.items()
            for number, request in enumerate(group.requests(), 1)
        ]
    )


def _score_cells(
    group: MethodResults, scores: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """Returns the cells of scores by split and view, attack AUCs and text logits."""
    return {
        **{
            f"{s} {view}": format_estimate(group.score(s, view), 1)
            for s, view in scores
        },
        **{
            f"attack AUC {view}": format_estimate(group.attack_auc(view), 3)
            for view in _ATTACKS
        },
        "text unchanged": group.text_logits_unchanged(),
    }


def _text(value: Any) -> str:
    return DASH if value is None else str(value)

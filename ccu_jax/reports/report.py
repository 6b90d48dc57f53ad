"""The report of a run: results.json, table.md, figure.png and report.html."""

import base64
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from ccu_jax.errors import replace_unprintable
from ccu_jax.reports import audit_table, figure, tables
from ccu_jax.reports.findings import collect_findings, describe_editions
from ccu_jax.reports.summary import Row, join_values
from ccu_jax.reports.tables import escape_markdown
from ccu_jax.runs.progress import Reporter
from ccu_jax.storage.files import to_plain_json, write_atomically

_TEMPLATE = pathlib.Path(__file__).with_name("report.html.jinja")
_REQUESTS_TITLE = "Sequential requests"
_STYLES = {"warning": "bold black on yellow", "passed": "green", "failed": "bold red"}


def write_report(
    workdir: pathlib.Path,
    rows: list[Row],
    config: dict[str, Any],
    audits: Sequence[dict[str, Any]] = (),
) -> None:
    """Writes the report files, each atomically.

    `audits` is the output of `audits.records.collect_records`, for report.html.
    """
    rows, config = to_plain_json(rows), to_plain_json(config)
    png = figure.draw(rows)
    # Render everything before writing, so that an error leaves the old files intact.
    files = {
        "results.json": json.dumps(rows, indent=1, allow_nan=False).encode(),
        "table.md": to_markdown(rows).encode("utf-8", "replace"),
        "figure.png": png,
        "report.html": _render_page(rows, config, png, audits).encode(),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(workdir / name, content)


def show(rows: list[Row], reporter: Reporter) -> None:
    """Prints tables and findings, as Markdown if the output is a log file."""
    if not reporter.is_active:
        return
    rows = to_plain_json(rows)
    if not reporter.is_live:
        return reporter.print(to_markdown(rows))
    reporter.print(_make_title(rows), style="bold")
    tables.make_method_table(rows).show(reporter)
    requests = tables.make_request_table(rows)
    if requests.rows:
        reporter.print(_REQUESTS_TITLE, style="bold")
        requests.show(reporter, num_fixed=2)
    for finding in collect_findings(rows):
        reporter.print(finding.text, style=_STYLES.get(finding.kind, ""))


def to_markdown(rows: list[Row]) -> str:
    """Formats tables and findings as Markdown; `rows` must be plain JSON."""
    warnings = [x.text for x in describe_editions(rows) if x.kind == "warning"]
    paragraphs = [f"# {escape_markdown(_make_title(rows))}"]
    paragraphs += [f"**{escape_markdown(text)}**" for text in warnings]
    if rows:
        paragraphs.append(tables.make_method_table(rows).to_markdown())
    requests = tables.make_request_table(rows)
    if requests.rows:
        paragraphs += [f"## {_REQUESTS_TITLE}", requests.to_markdown()]
    items = []
    for finding in collect_findings(rows):
        text = escape_markdown(finding.text)
        is_bold = finding.kind in ("warning", "failed")
        items.append(f"- **{text}**" if is_bold else f"- {text}")
    return "\n\n".join([*paragraphs, "\n".join(items)]) + "\n"


def _make_title(rows: Sequence[Row]) -> str:
    config, edition = join_values(rows, "config"), join_values(rows, "edition")
    return f"{config} ({edition}), {join_values(rows, 'metric')} in %"


def _render_page(
    rows: list[Row], config: Any, png: bytes, audits: Sequence[Any]
) -> str:
    """Renders the report as one HTML page without scripts or external resources."""
    environment = jinja2.Environment(
        autoescape=True,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        title=_make_title(rows),
        findings=collect_findings(rows),
        methods=tables.make_method_table(rows),
        requests=tables.make_request_table(rows),
        requests_title=_REQUESTS_TITLE,
        audits=audits,
        audit_table=audit_table.make_table(audits) if audits else None,
        audit_legend=audit_table.LEGEND,
        png=base64.b64encode(png).decode(),
        seeds=tables.make_seed_table(rows),
        config=json.dumps(config, indent=2, ensure_ascii=False),
    )
    return replace_unprintable(page)

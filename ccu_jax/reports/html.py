"""Writes the report: results.json, table.md, figure.png and report.html."""

import base64
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from ccu_jax.errors import printable
from ccu_jax.reports import audit_table, figure, results_table
from ccu_jax.reports.findings import collect_findings
from ccu_jax.reports.summary import Row
from ccu_jax.storage.files import to_plain_json, write_atomically

_TEMPLATE = pathlib.Path(__file__).with_name("report.html.jinja")


def write_report(
    workdir: pathlib.Path,
    rows: list[Row],
    config: dict[str, Any],
    audits: Sequence[dict[str, Any]] = (),
) -> None:
    """Writes the files of the report, each atomically.

    `audits` are the records of `collection.collect_records`, for report.html.
    """
    rows, config = to_plain_json(rows), to_plain_json(config)
    png = figure.draw(rows)
    # Render everything before writing, so that an error leaves the old files in place.
    files = {
        "results.json": json.dumps(rows, indent=1, allow_nan=False).encode(),
        "table.md": results_table.markdown(rows).encode("utf-8", "replace"),
        "figure.png": png,
        "report.html": render_page(rows, config, png, audits).encode(),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(workdir / name, content)


def render_page(rows: list[Row], config: Any, png: bytes, audits: Sequence[Any]) -> str:
    """Returns the report as one HTML page without scripts or external resources."""
    environment = jinja2.Environment(
        autoescape=True,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        title=results_table.title(rows),
        findings=collect_findings(rows),
        methods=results_table.method_table(rows),
        requests=results_table.request_table(rows),
        requests_title=results_table.REQUESTS_TITLE,
        audits=audits,
        audit_table=audit_table.table(audits) if audits else None,
        audit_legend=audit_table.LEGEND,
        png=base64.b64encode(png).decode(),
        seeds=results_table.seed_table(rows),
        config=json.dumps(config, indent=2, ensure_ascii=False),
    )
    return printable(page)

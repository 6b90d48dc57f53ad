"""Results -> results.json, table.md, figure.png and report.html, and the screen.

`summary.py` makes numbers of the rows, `notes.py` sentences, `figure.py` a picture, and
`tables.py` lays out a table, and `progress.py` shows a run while it runs. Every text
that came from data is escaped.
"""

import base64
import html
import json
import pathlib
from collections.abc import Iterator, Sequence

from ccu_jax.errors import printable
from ccu_jax.evaluate.predictions import SPLITS
from ccu_jax.methods import REFERENCE
from ccu_jax.models import VIEWS, VISUAL
from ccu_jax.reports import audit_table, figure, summary, tables
from ccu_jax.reports import findings as notes
from ccu_jax.reports.summary import DASH, Row, estimate
from ccu_jax.runs.progress import Reporter
from ccu_jax.storage.files import to_plain_json, write_atomically

__all__ = ["Reporter", "markdown", "show", "write"]

_SECONDS = ("start", "steps", "unlearn", "compile", "evaluate", "total")
_ATTACKS = ("image", "fused", "text", "pair", "white")
_SCORES = (
    *(("test", view) for view in VIEWS),
    *(("unlearn", view) for view in VIEWS),
    ("retain", "fused"),
)
# Of rows that are gone, by request: of all of them, and of those of the first.
_STREAMED = tuple((of, view) for of in ("all", "first") for view in VISUAL)
_STREAMING = "Streaming: requests one after another"
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --loud: #b35900; --good: #1a7f4b;
  --bad: #c0362c; }
@media (prefers-color-scheme: dark) {
  :root { --loud: #ffb454; --good: #5fd39a; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right;
  white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.ccu td { font-weight: 600; }
li { margin: .3rem 0; }
.loud { border: 2px solid var(--loud); color: var(--loud); font-weight: 700;
  padding: .5rem .8rem; }
.yes::marker, .yes b { color: var(--good); } .no::marker, .no b { color: var(--bad); }
img { background: #fff; border-radius: 6px; max-width: 100%; }
pre { border: 1px solid var(--line); overflow-x: auto; padding: .8rem; }
"""


def write(
    workdir: pathlib.Path, rows: list[Row], config: dict, audits: Sequence[dict] = ()
) -> None:
    """Writes results.json, table.md, figure.png and report.html, each as a whole.

    Args:
        workdir: where to.
        rows: of results.
        config: as plain JSON.
        audits: of `auditing.collected`, for the page.
    """
    rows, config = to_plain_json(rows), to_plain_json(config)
    png = figure.draw(rows)
    # All are made before the first is written: an error leaves the old ones alone.
    files = {
        "results.json": json.dumps(rows, indent=1, allow_nan=False).encode(),
        "table.md": markdown(rows).encode("utf-8", "replace"),
        "figure.png": png,
        "report.html": printable(_page(rows, config, png, audits)).encode(),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(workdir / name, content)


def markdown(rows: list[Row]) -> str:
    """Returns the table and the sentences below it as Markdown."""
    rows = to_plain_json(rows)
    told = [f"# {tables.escaped(_title(rows))}", ""]
    for note in notes.editions(rows):
        told += [f"**{tables.escaped(note.text)}**", ""] if note.kind == "loud" else []
    told += [*tables.markdown(*_table(rows)), ""]
    header, lines = _streaming(rows)
    if lines:
        told += [f"## {_STREAMING}", "", *tables.markdown(header, lines), ""]
    for note in notes.notes(rows):
        text = tables.escaped(note.text)
        told.append(f"- **{text}**" if note.kind in ("loud", "no") else f"- {text}")
    return "\n".join(told) + "\n"


def show(rows: list[Row], reporter: Reporter) -> None:
    """Prints the table and the sentences: rich on a terminal, else the Markdown."""
    if not reporter.active:
        return
    if not reporter.live:
        return reporter.print(markdown(rows))
    rows = to_plain_json(rows)
    reporter.print(_title(rows), style="bold")
    tables.show(*_table(rows), reporter)
    header, lines = _streaming(rows)
    if lines:
        reporter.print(_STREAMING, style="bold")
        tables.show(header, lines, reporter, keep=2)
    styles = {"loud": "bold black on yellow", "yes": "green", "no": "bold red"}
    for note in notes.notes(rows):
        reporter.print(note.text, style=styles.get(note.kind, ""))


def _title(rows: Sequence[Row]) -> str:
    def seen(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row.get(key, DASH)) for row in rows)) or DASH

    return f"{seen('config')} ({seen('edition')}), {seen('metric')} in %"


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of the main table, one line per method."""
    groups = summary.by_method(rows)
    best = summary.best_baseline(groups)
    header = ["method", "time s", f"time % of {REFERENCE}"]
    header += [f"time % of {best} (best baseline)"] if best else []
    header += [f"{where} {view}" for where, view in _SCORES]
    header += [f"attack AUC {view}" for view in _ATTACKS]
    header += ["text kept"]
    others = [REFERENCE, *([best] if best else [])]
    return header, [_line(name, groups, others) for name in groups]


def _line(name: str, groups: dict, others: list[str]) -> list[str]:
    """Returns a method's cells; its time also in % of that of each of the others."""
    group, shown = groups[name], summary.show_estimate
    line = [name + (" (diverged)" if summary.diverged(group) else "")]
    if name == "original":  # its time is training, told in a note
        line += [DASH] * (1 + len(others))
    else:
        line += [shown(estimate([summary.time_s(row) for row in group.values()]))]
        line += [
            shown(summary.time_percent(group, groups.get(other, {})))
            for other in others
        ]
    for where, view in _SCORES:
        values = [summary.score(row, where, view) for row in group.values()]
        line.append(shown(estimate(values), 1))
    for view in _ATTACKS:
        values = [summary.auc(row, view) for row in group.values()]
        line.append(shown(estimate(values), 3))
    return [*line, summary.text_kept(group)]


def _streaming(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of the requests, a line per method and request."""
    groups, shown = summary.by_method(rows), summary.show_estimate
    header = ["method", "request", "rows", "time s", f"time % of {REFERENCE}"]
    names = {"all": "all so far", "first": "the first's"}
    header += [f"attack AUC {view}, {names[of]}" for of, view in _STREAMED]
    header += ["test fused"]
    lines = []
    for name, group in groups.items():
        for number, told in enumerate(summary.requests(group), 1):

            def mean(value, told=told) -> summary.Estimate:
                return estimate([value(request) for request in told.values()])

            line = [name, str(number)]
            line += [shown(mean(lambda row: summary.number(row, "count")), 0)]
            line += [shown(mean(summary.time_s))]
            line += [shown(summary.time_percent(told, groups.get(REFERENCE, {})))]
            for of, view in _STREAMED:
                path = ("attack_auc", of, view)
                line += [shown(mean(lambda row, p=path: summary.number(row, *p)), 3)]
            line += [shown(mean(lambda row: summary.score(row, "test", "fused")), 1)]
            lines.append(line)
    return header, lines


def _rows_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of the second table, one line per method and seed."""
    header = ["method", "seed", *(f"{name} s" for name in _SECONDS)]
    header += [f"{where} {view}" for where in SPLITS for view in VIEWS]
    header += [f"attack AUC {view}" for view in _ATTACKS]
    header += ["text kept", "diverged", "unlearn rule", "count", "commit"]
    lines = []
    for name, group in summary.by_method(rows).items():
        for seed, row in group.items():
            told = [(summary.number(row, "seconds", key), None) for key in _SECONDS]
            told += [(summary.score(row, s, v), 1) for s in SPLITS for v in VIEWS]
            told += [(summary.auc(row, view), 3) for view in _ATTACKS]
            cells = [summary.show_estimate(estimate([x]), digits) for x, digits in told]
            chosen = row.get("unlearn_set")
            chosen = chosen if isinstance(chosen, dict) else {}
            last = [row.get("diverged"), chosen.get("rule"), chosen.get("count")]
            last = [DASH if x is None else str(x) for x in [*last, row.get("commit")]]
            kept = summary.text_kept({seed: row})
            lines.append([name, str(seed), *cells, kept, *last])
    return header, lines


def _page(rows: Sequence[Row], config: dict, png: bytes, audits: Sequence[dict]) -> str:
    """Returns the report as one page: no script, nothing fetched, all text escaped."""
    told = notes.notes(rows)
    loud = [note for note in told if note.kind == "loud"]
    rest = [note for note in told if note.kind != "loud"]
    picture = base64.b64encode(png).decode()
    header, lines = _streaming(rows)
    streaming = [f"<h2>{_STREAMING}</h2>", tables.page(header, lines)] if lines else []
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src '
        "'none'; style-src 'unsafe-inline'; img-src data:\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(_title(rows))}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{html.escape(_title(rows))}</h1>",
        *(f'<p class="loud">{html.escape(note.text)}</p>' for note in loud),
        tables.page(*_table(rows)),
        "<ul>",
        *(f'<li class="{note.kind}">{_html_note(note)}</li>' for note in rest),
        "</ul>",
        *streaming,
        *_audit(audits),
        '<img alt="Attack AUC against score, and time, per method" '
        f'src="data:image/png;base64,{picture}">',
        "<h2>Every method and seed</h2>",
        tables.page(*_rows_table(rows)),
        "<h2>Configuration</h2>",
        f"<pre>{html.escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _audit(audits: Sequence[dict]) -> Iterator[str]:
    """Yields the verdicts, and the sentences that they come from."""
    if not audits:
        return
    yield "<h2>Audit</h2>"
    yield tables.page(*audit_table.table(audits))
    yield f"<p>{html.escape(audit_table.LEGEND)}</p><ul>"
    for one in audits:
        sentence = html.escape(one["verdict"]["sentence"])
        yield f"<li><b>{html.escape(one['method'])}</b>: {sentence}</li>"
    yield "</ul>"


def _html_note(note: notes.Note) -> str:
    mark = f"<b>{note.kind}</b> – " if note.kind in ("yes", "no") else ""
    return mark + html.escape(note.text)

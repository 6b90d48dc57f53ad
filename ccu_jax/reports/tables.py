"""Tables of results, for Markdown and terminals; cells may contain any text."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ccu_jax.errors import replace_unprintable
from ccu_jax.evaluate.predictions import SPLITS
from ccu_jax.methods import REFERENCE
from ccu_jax.models import VIEWS, VISUAL
from ccu_jax.reports import summary
from ccu_jax.reports.summary import DASH, MethodResults, Row, format_estimate, get_value
from ccu_jax.runs.progress import Reporter

_PHASES = ("start", "steps", "unlearn", "compile", "evaluate", "total")
# Attacked views by column title.
_ATTACKS = {view: view for view in ("image", "fused", "text", "pair")}
_ATTACKS["white-box"] = "white"
_SCORES = (*itertools.product(("test", "unlearn"), VIEWS), ("retain", "fused"))


class Table(NamedTuple):
    """A table of strings; the first column names the row, the others are values."""

    header: list[str]
    rows: list[list[str]]

    @classmethod
    def from_cells(cls, cells: Iterable[dict[str, str]]) -> "Table":
        """Builds a table from one dict per row that maps column titles to cells."""
        cells = list(cells)
        header = list(cells[0]) if cells else []
        return cls(header, [[row[title] for title in header] for row in cells])

    def to_markdown(self) -> str:
        """Formats the table as Markdown."""
        rule = "|" + "|".join([" --- "] + [" ---: "] * (len(self.header) - 1)) + "|"
        header, *rows = (
            "| " + " | ".join(escape_markdown(cell) for cell in row) + " |"
            for row in (self.header, *self.rows)
        )
        return "\n".join([header, rule, *rows])

    def show(self, reporter: Reporter, num_fixed: int = 1) -> None:
        """Prints Markdown to a log file, or tables that fit the width of the terminal.

        Each of these tables repeats the first `num_fixed` columns.
        """
        if not reporter.is_live:
            return reporter.print(self.to_markdown())
        for columns in self._split_columns(reporter.console.width, num_fixed):
            reporter.print_table(
                [self.header[column] for column in columns],
                [[row[column] for column in columns] for row in self.rows],
            )

    def _split_columns(self, width: int, num_fixed: int) -> list[list[int]]:
        """Splits column indices into tables that fit into `width` characters."""
        columns = zip(self.header, *self.rows, strict=True)
        widths = [
            max(map(len, (*title.split(), *cells))) + 3 for title, *cells in columns
        ]
        parts: list[list[int]] = [[*range(num_fixed)]]
        for column in range(num_fixed, len(self.header)):
            used = sum(widths[x] for x in parts[-1])
            if used + widths[column] > width and len(parts[-1]) > num_fixed:
                parts.append([*range(num_fixed)])
            parts[-1].append(column)
        return parts


def escape_markdown(text: str) -> str:
    """Joins lines, replaces unprintable characters and escapes Markdown."""
    text = replace_unprintable(" ".join(text.split()))
    return re.sub(r"([\\`*\[\]|<>!&])", r"\\\1", text)


def make_method_table(rows: Sequence[Row]) -> Table:
    """Builds the main table, with one row per method."""
    groups = summary.group_by_method(rows)
    baseline = summary.find_best_baseline(groups)
    compared = {f"time (% of {REFERENCE})": groups.get(REFERENCE, MethodResults())}
    if baseline:
        compared[f"time (% of {baseline}, best baseline)"] = groups[baseline]

    def format_row(name: str, group: MethodResults) -> dict[str, str]:
        times = {"time (s)": group.mean_time_s()}
        times |= {title: group.mean_time_percent(x) for title, x in compared.items()}
        time_cells = {title: format_estimate(time) for title, time in times.items()}
        if name == "original":  # its training time is a finding
            time_cells = dict.fromkeys(times, DASH)
        return {
            "method": name + (" (diverged)" if group.divergence_reasons() else ""),
            **time_cells,
            **_format_scores(group, _SCORES),
        }

    return Table.from_cells(format_row(*item) for item in groups.items())


def make_seed_table(rows: Sequence[Row]) -> Table:
    """Builds the detailed table, with one row per method and seed."""

    def format_row(name: str, seed: str, row: Row) -> dict[str, str]:
        group = MethodResults({seed: row})
        times = {f"{x} (s)": group.mean_number("seconds", x) for x in _PHASES}
        texts = {
            "diverged": get_value(row, "diverged"),
            "unlearn rule": get_value(row, "unlearn_set", "rule"),
            "unlearned rows": get_value(row, "unlearn_set", "count"),
            "commit": get_value(row, "commit"),
        }
        return {
            "method": name,
            "seed": seed,
            **{title: format_estimate(time) for title, time in times.items()},
            **_format_scores(group, itertools.product(SPLITS, VIEWS)),
            **{title: DASH if x is None else str(x) for title, x in texts.items()},
        }

    return Table.from_cells(
        format_row(name, seed, row)
        for name, group in summary.group_by_method(rows).items()
        for seed, row in group.rows.items()
    )


def make_request_table(rows: Sequence[Row]) -> Table:
    """Builds the table of sequential requests, with one row per method and request."""
    groups = summary.group_by_method(rows)
    reference = groups.get(REFERENCE, MethodResults())
    # Attacks on the images of all requests so far and of the first request.
    attacks = {
        f"attack AUC {view}, {name}": ("attack_auc", key, view)
        for key, name in (("all", "all requests"), ("first", "first request"))
        for view in VISUAL
    }

    def format_row(name: str, number: int, request: MethodResults) -> dict[str, str]:
        percent = request.mean_time_percent(reference)
        aucs = {title: request.mean_number(*path) for title, path in attacks.items()}
        return {
            "method": name,
            "request": str(number),
            "rows": format_estimate(request.mean_number("count"), 0),
            "time (s)": format_estimate(request.mean_time_s()),
            f"time (% of {REFERENCE})": format_estimate(percent),
            **{title: format_estimate(auc, 3) for title, auc in aucs.items()},
            "test fused": format_estimate(request.mean_score("test", "fused"), 1),
        }

    return Table.from_cells(
        format_row(name, number, request)
        for name, group in groups.items()
        for number, request in enumerate(group.split_by_request(), 1)
    )


def _format_scores(
    group: MethodResults, scores: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """Returns the cells of the scores, attack AUCs and unchanged text logits."""
    values = {
        f"{split} {view}": group.mean_score(split, view) for split, view in scores
    }
    aucs = {
        f"attack AUC {x}": group.mean_attack_auc(view) for x, view in _ATTACKS.items()
    }
    return {
        **{title: format_estimate(value, 1) for title, value in values.items()},
        **{title: format_estimate(auc, 3) for title, auc in aucs.items()},
        "text logits unchanged": group.format_text_unchanged(),
    }

"""Tables of text cells, as Markdown and on a terminal. Cells may hold any text."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from ccu_jax.errors import printable
from ccu_jax.runs.progress import Reporter


class Table(NamedTuple):
    """A table whose first column names the row and whose other columns are numbers."""

    header: list[str]
    rows: list[list[str]]

    @classmethod
    def from_cells(cls, cells: Sequence[dict[str, str]]) -> "Table":
        """Builds a table from one dict per row, from column title to cell text."""
        header = list(cells[0]) if cells else []
        return cls(header, [[row[title] for title in header] for row in cells])

    def to_markdown(self) -> str:
        """Returns a Markdown table."""
        rule = "|" + "|".join([" --- "] + [" ---: "] * (len(self.header) - 1)) + "|"
        header, *rows = (
            "| " + " | ".join(escape_markdown(cell) for cell in row) + " |"
            for row in (self.header, *self.rows)
        )
        return "\n".join([header, rule, *rows])

    def show(self, reporter: Reporter, num_fixed: int = 1) -> None:
        """Prints Markdown to a log file, and to a terminal as many tables as fit.

        Args:
            reporter: prints the table.
            num_fixed: how many leading columns to repeat in each of these tables.
        """
        if not reporter.is_live:
            return reporter.print(self.to_markdown())
        for columns in self._split_columns(reporter.console.width, num_fixed):
            reporter.print_table(
                [self.header[column] for column in columns],
                [[row[column] for column in columns] for row in self.rows],
            )

    def _split_columns(self, width: int, num_fixed: int) -> list[list[int]]:
        """Returns the columns of each table that fits into `width` characters."""

        def column_width(column: int) -> int:
            words = [*self.header[column].split(), *(row[column] for row in self.rows)]
            return max(map(len, words)) + 3

        fixed = list(range(num_fixed))
        fixed_width = sum(map(column_width, fixed))
        parts, used = [[*fixed]], fixed_width
        for column in range(num_fixed, len(self.header)):
            if used + column_width(column) > width and len(parts[-1]) > num_fixed:
                parts.append([*fixed])
                used = fixed_width
            parts[-1].append(column)
            used += column_width(column)
        return parts


def escape_markdown(text: str) -> str:
    """Escapes what Markdown or a terminal would interpret, on one line."""
    text = printable(" ".join(text.split()))
    return re.sub(r"([\\`*\[\]|<>!&])", r"\\\1", text)

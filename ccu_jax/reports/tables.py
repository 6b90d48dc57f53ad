"""A table, given as header and lines of cells: as Markdown, as HTML, on the screen.

All text is escaped here, wherever it came from. The first column names a line, the
others are numbers.
"""

import html
import re

from ccu_jax.errors import printable
from ccu_jax.runs.progress import Reporter


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    rule = "|" + "|".join([" --- "] + [" ---: "] * (len(header) - 1)) + "|"
    texts = [
        "| " + " | ".join(escaped(cell) for cell in line) + " |"
        for line in (header, *lines)
    ]
    return [texts[0], rule, *texts[1:]]


def escaped(text: str) -> str:
    """Escapes what Markdown, a table in it, or a terminal would read as its own."""
    text = printable(" ".join(text.split()))
    return re.sub(r"([\\`*\[\]|<>!&])", r"\\\1", text)


def page(header: list[str], lines: list[list[str]]) -> str:
    """Returns an HTML table; methods of this project stand out."""

    def cells(tag: str, texts: list[str]) -> str:
        return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)

    body = "\n".join(
        f'<tr class="{"ccu" if line[0].startswith("ccu") else ""}">'
        f"{cells('td', line)}</tr>"
        for line in lines
    )
    head = f"<thead><tr>{cells('th', header)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def show(
    header: list[str], lines: list[list[str]], reporter: Reporter, keep: int = 1
) -> None:
    """Prints a table: in a log file as Markdown, on a terminal in parts that fit it.

    Args:
        header: of the columns.
        lines: of cells.
        reporter: whose screen it is.
        keep: how many columns stand in every part.
    """
    if not reporter.live:
        return reporter.print("\n".join(markdown(header, lines)))
    for part in _parts(header, lines, reporter.console.width, keep):
        reporter.print_table(
            [header[column] for column in part],
            [[line[column] for column in part] for line in lines],
        )


def _parts(header: list, lines: list, width: int, keep: int) -> list[list[int]]:
    """Returns the columns of tables that fit `width`, the first `keep` in each."""

    def needed(column: int) -> int:
        words = header[column].split() + [line[column] for line in lines]
        return max(len(word) for word in words) + 3

    first = list(range(keep))
    parts, used = [[*first]], sum(map(needed, first))
    for column in range(keep, len(header)):
        if used + needed(column) > width and len(parts[-1]) > keep:
            parts.append([*first])
            used = sum(map(needed, first))
        parts[-1].append(column)
        used += needed(column)
    return parts

"""Shared code of the commands: types of flags, timing, tables and a child process.

Imports no JAX, so that the child process that runs PyTorch does not import it either.
"""

import argparse
import functools
import importlib
import math
import multiprocessing
import operator
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, Self, TypeVar

from rich.table import Table

from ccu_jax.errors import UserError

_PROGRESS_EVERY_S = 2.0
Name = TypeVar("Name", bound=Hashable)


class Command(NamedTuple):
    """A benchmark: `measure` returns plain JSON, and `make_tables` shows it."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    make_tables: Callable[[dict[str, Any]], list[Table]]


# --- types of flags -------------------------------------------------------------------


def one_of(choices: Collection[str]) -> Callable[[str], str]:
    """Returns the type of a flag that is one of the choices."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"unknown name {text!r}; choose from {', '.join(choices)}"
            )
        return text

    return parse


def at_least(minimum: int) -> Callable[[str], int]:
    """Returns the type of a flag that is a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number of at least {minimum}"
            )
        return int(text)

    return parse


def list_of(parse_item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Returns the type of a flag that lists items separated by commas."""

    def parse(text: str) -> list[Any]:
        items = [parse_item(item) for item in text.split(",")]
        if len(set(items)) < len(items):
            raise argparse.ArgumentTypeError(f"{text!r} repeats an item")
        return items

    return parse


def user_path(text: str) -> pathlib.Path:
    """Parses a path, in which ~ is the home folder."""
    return pathlib.Path(text).expanduser()


def add_flag(
    parser: argparse.ArgumentParser,
    name: str,
    parse: Callable[[str], Any],
    default: Any,
    help_text: str = "",
) -> None:
    """Adds a flag whose help names the default."""
    text = ",".join(map(str, default)) if isinstance(default, list) else default
    help_text = f"{help_text} (default {text})".strip()
    parser.add_argument(name, type=parse, default=default, help=help_text)


# --- timing ---------------------------------------------------------------------------


class Progress:
    """Prints how far the stages of a benchmark are, to stderr."""

    def __init__(self, title: str):
        """Sets the start of every line."""
        self._title, self._stage, self._printed_s = title, "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Prints at the start and end of a stage, and every two seconds between."""
        now = time.monotonic()
        is_due = now - self._printed_s >= _PROGRESS_EVERY_S
        if is_due or stage != self._stage or done == total:
            self._stage, self._printed_s = stage, now
            line = f"{self._title}: {stage} {done:,}/{total:,}"
            print(line, file=sys.stderr, flush=True)


def measure_in_turn(
    calls: Mapping[Name, Callable[[], Any]], windows: int, progress: Progress
) -> dict[Name, list[Any]]:
    """Calls all functions once per window, so that all are measured under equal load.

    One more window comes first, to warm up, and is dropped.

    Returns:
        The results of every function, window by window.
    """
    results: dict[Name, list[Any]] = {name: [] for name in calls}
    total = (windows + 1) * len(calls)
    for window in range(windows + 1):
        # Alternate the order: steadily growing load would favour the first.
        names = list(calls) if window % 2 else list(calls)[::-1]
        for position, name in enumerate(names):
            progress("measuring", window * len(calls) + position, total)
            result = calls[name]()
            if window:
                results[name].append(result)
    progress("measuring", total, total)
    return results


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Returns `median`, `low` and `high` of the windows, and all `windows`."""
    values = [float(value) for value in values]
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "windows": values,
    }


def median_ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Returns the median over windows of the ratio of two summaries."""
    return statistics.median(map(operator.truediv, a["windows"], b["windows"]))


# --- the machine ----------------------------------------------------------------------


def read_system_field(path: str, name: str) -> str | None:
    """Returns the value of a line "name: value" of a file in /proc; None off Linux."""
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError:
        return None
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return next((value.strip() for key, value in pairs if key.strip() == name), None)


def memory_mib(field: str) -> float:
    """Returns a field of /proc/self/status in MiB, such as VmRSS; NaN off Linux."""
    value = read_system_field("/proc/self/status", field)
    return int(value.split()[0]) / 1024 if value else math.nan


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- tables ---------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        header: its title.
        key: of the value in a row; dots lead into nested dicts, as in "seconds.low".
        format: format specification of a number, such as ",.1f".
        scale: numbers are multiplied by it.
    """

    header: str
    key: str
    format: str = ""
    scale: float = 1


def spread_columns(
    header: str, key: str, format: str, scale: float = 1
) -> list[Column]:
    """Returns the columns of a summary: median, lowest and highest window."""
    titles = {header: "median", "low": "low", "high": "high"}
    return [
        Column(title, f"{key}.{name}", format, scale) for title, name in titles.items()
    ]


def make_table(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    caption: str | None = None,
) -> Table:
    """Returns a table with one line per row; a value that is None is left empty."""
    table = Table(title=title, caption=caption)
    for column in columns:
        table.add_column(column.header, justify="right" if column.format else "left")
    for row in rows:
        table.add_row(*(_format_cell(row, column) for column in columns))
    return table


def _format_cell(row: Mapping[str, Any], column: Column) -> str:
    value: Any = functools.reduce(
        lambda node, key: node and node.get(key), column.key.split("."), row
    )
    if value is None or isinstance(value, str):
        return value or ""
    return format(value * column.scale, column.format)


# --- a child process ------------------------------------------------------------------


class ChildProcess:
    """A new Python process with its own threads and memory; a context manager."""

    def __init__(self, **environment: str):
        """Sets environment variables, before the process imports large libraries."""
        self._pool = ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_set_environment,
            initargs=(environment,),
        )

    def __enter__(self) -> Self:
        """Returns the process, which starts at its first call."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the process."""
        self._pool.shutdown(cancel_futures=True)

    def call(self, module: str, function: str, *args: Any) -> Any:
        """Calls `ccu_jax.benchmarks.MODULE.FUNCTION` in the process.

        Raises:
            UserError: the function raised one, or the process was killed.
            RuntimeError: the function raised any other error.
        """
        try:
            return self._pool.submit(_call, module, function, *args).result()
        except BrokenProcessPool:
            raise UserError(
                f"{module}: the child process was killed; check that memory suffices"
            ) from None


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _call(module: str, function: str, *args: Any) -> Any:
    try:
        imported = importlib.import_module(f"ccu_jax.benchmarks.{module}")
        return getattr(imported, function)(*args)
    except UserError:
        raise
    except Exception as error:
        # The parent process may be unable to import the class of the error.
        line = str(error).partition("\n")[0]
        raise RuntimeError(f"{type(error).__name__}: {line}") from error

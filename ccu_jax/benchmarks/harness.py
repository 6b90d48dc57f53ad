"""Shared code of the commands: flags, timing, tables and a child process.

Imports no JAX, so that the child process that runs PyTorch does not import it either.
"""

import argparse
import contextlib
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
from collections.abc import Callable, Collection, Generator, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

from rich.table import Table

from ccu_jax.errors import UserError

_PROGRESS_EVERY_S = 2.0
Name = TypeVar("Name", bound=Hashable)


class Column(NamedTuple):
    """A column of a table, whose values are strings, numbers or summaries."""

    header: str
    key: str  # of the value in a row; "first.rows" leads into nested dicts
    format: str = ""  # format specification of numbers
    scale: float = 1  # factor of numbers


class Measurements(NamedTuple):
    """A table of measurements: `name` is its key in the JSON, `rows` are plain JSON."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    caption: str = ""


class Flag(NamedTuple):
    """A flag of a command; with `parse=bool` it is --name or --no-name."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str


class Command(NamedTuple):
    """A benchmark; every command also has the flags --windows and --json."""

    help: str
    flags: Sequence[Flag]
    windows: int  # default number of measurements
    measure: Callable[[argparse.Namespace], list[Measurements]]


def one_of(choices: Collection[str]) -> Callable[[str], str]:
    """Returns the type of a flag that is one of the choices."""

    def parse(text: str) -> str:
        if text in choices:
            return text
        names = ", ".join(choices)
        raise argparse.ArgumentTypeError(f"unknown name {text!r}; choose from {names}")

    return parse


def at_least(minimum: int) -> Callable[[str], int]:
    """Returns the type of a flag that is a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,9}", text) and int(text) >= minimum:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of at least {minimum}"
        )

    return parse


def list_of(parse_item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Returns the type of a flag that lists different items, separated by commas."""

    def parse(text: str) -> list[Any]:
        items = [parse_item(item) for item in text.split(",")]
        if len(set(items)) < len(items):
            raise argparse.ArgumentTypeError(f"{text!r} repeats an item")
        return items

    return parse


def parse_path(text: str) -> pathlib.Path:
    """Parses a path, in which ~ is the home folder."""
    return pathlib.Path(text).expanduser()


class Progress:
    """Prints the progress of each stage to stderr, at most every two seconds."""

    def __init__(self, title: str):
        """Sets the title, which starts every line."""
        self._title, self._stage, self._printed_s = title, "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Reports progress; the start and the end of a stage are always printed."""
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

    Returns the results of every function, without a first window that warms up.
    """
    results: dict[Name, list[Any]] = {name: [] for name in calls}
    total = (windows + 1) * len(calls)
    for window in range(windows + 1):
        # Alternate the order: steadily growing load would favor the first function.
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
    limits = {"low": min(values), "high": max(values)}
    return {"median": statistics.median(values), **limits, "windows": [*values]}


def median_ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Returns the median over windows of the ratio of two summaries."""
    return statistics.median(map(operator.truediv, a["windows"], b["windows"]))


def read_system_field(path: str, name: str) -> str | None:
    """Returns the value of a line "name: value" of a file in /proc; None off Linux."""
    try:
        text = pathlib.Path(path).read_text()
    except OSError:
        return None
    match = re.search(rf"^{name}[ \t]*:(.*)", text, re.MULTILINE)
    return match and match[1].strip()


def read_memory_mib(field: str) -> float:
    """Returns a field of /proc/self/status in MiB, such as VmRSS; NaN off Linux."""
    value = read_system_field("/proc/self/status", field)
    return int(value.split()[0]) / 1024 if value else math.nan


def count_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_table(measurements: Measurements) -> Table:
    """Returns a table with one line per row; missing and None values stay empty."""
    columns = measurements.columns
    table = Table(title=measurements.title, caption=measurements.caption or None)
    for column in columns:
        table.add_column(column.header, justify="right" if column.format else "left")
    for row in measurements.rows:
        table.add_row(*(_format_cell(row, column) for column in columns))
    return table


def _format_cell(row: Mapping[str, Any], column: Column) -> str:
    value: Any = row
    for key in column.key.split("."):
        value = value and value.get(key)
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, dict):
        return format(value * column.scale, column.format)
    names = ("median", "low", "high")
    numbers = (format(value[x] * column.scale, column.format) for x in names)
    return "{} ({} to {})".format(*numbers)


@contextlib.contextmanager
def start_child(**environment: str) -> Generator[Callable[..., Any]]:
    """Starts a Python process with its own threads and memory.

    The environment variables are set before the process imports large libraries.

    Yields:
        `call("MODULE.FUNCTION", *args)`, which calls a function of a module of
        `ccu_jax.benchmarks` in the process. It raises the `UserError` of the function
        or of a killed process, and any other error as a RuntimeError.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _set_environment, (environment,)) as pool:

        def call(name: str, *args: Any) -> Any:
            try:
                return pool.submit(_call, name, *args).result()
            except BrokenProcessPool:
                raise UserError(
                    f"{name}: the child process was killed; check that memory suffices"
                ) from None

        yield call


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _call(name: str, *args: Any) -> Any:
    module, _, function = name.partition(".")
    try:
        imported = importlib.import_module(f"ccu_jax.benchmarks.{module}")
        return getattr(imported, function)(*args)
    except UserError:
        raise
    except Exception as error:
        # The parent process may be unable to import the class of the error.
        line = str(error).partition("\n")[0]
        raise RuntimeError(f"{type(error).__name__}: {line}") from error

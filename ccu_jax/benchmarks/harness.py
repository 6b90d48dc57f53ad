"""Code shared by the benchmarks: flags, timing, tables and a child process.

Does not import JAX, because the child process that runs PyTorch imports this module.
"""

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
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Generator, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

from rich.table import Table

from ccu_jax.errors import UserError

_PROGRESS_EVERY_S = 2.0
Name = TypeVar("Name", bound=Hashable)


class Column(NamedTuple):
    """A table column whose values are strings, numbers or results of `summarize`."""

    header: str
    key: str  # of the value in a row; dots separate the keys of nested dicts
    format: str = ""  # format specification of numbers
    scale: float = 1  # numbers are multiplied by this


class Measurements(NamedTuple):
    """A table of measurements; `name` is its key in the JSON, `rows` are plain JSON."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    caption: str = ""


class Flag(NamedTuple):
    """A flag of a command; `parse=bool` makes a switch, --name or --no-name."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str


class Command(NamedTuple):
    """A benchmark; every command also has the flags --windows and --json."""

    help: str
    flags: Sequence[Flag]
    windows: int  # default of --windows
    measure: Callable[[Namespace], list[Measurements]]


def one_of(choices: Collection[str]) -> Callable[[str], str]:
    """Returns a flag parser that accepts one of `choices`."""

    def parse(text: str) -> str:
        if text in choices:
            return text
        names = ", ".join(choices)
        raise ArgumentTypeError(f"unknown name {text!r}; choose from {names}")

    return parse


def at_least(minimum: int) -> Callable[[str], int]:
    """Returns a flag parser for integers of at least `minimum`."""

    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,9}", text) and int(text) >= minimum:
            return int(text)
        raise ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")

    return parse


def list_of(parse_item: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Returns a flag parser for a comma-separated list of distinct items."""

    def parse(text: str) -> list[Any]:
        items = [parse_item(item) for item in text.split(",")]
        if len(set(items)) < len(items):
            raise ArgumentTypeError(f"{text!r} repeats an item; pass each item once")
        return items

    return parse


def names_flag(name: str, choices: Collection[str], default: str, help: str) -> Flag:
    """Returns a flag for a list of distinct `choices`; an empty default means all."""
    return Flag(name, list_of(one_of(choices)), default or ",".join(choices), help)


def parse_path(text: str) -> pathlib.Path:
    """Parses a path and expands ~ to the home directory."""
    return pathlib.Path(text).expanduser()


class Progress:
    """Prints the progress of each stage to stderr, at most every two seconds."""

    def __init__(self, title: str):
        """Sets the title that is printed at the start of every line."""
        self._title, self._stage, self._printed_s = title, "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Reports `done` of `total` items; prints every start and end of a stage."""
        now = time.monotonic()
        is_due = now - self._printed_s >= _PROGRESS_EVERY_S
        if is_due or stage != self._stage or done == total:
            self._stage, self._printed_s = stage, now
            line = f"{self._title}: {stage} {done:,}/{total:,}"
            print(line, file=sys.stderr, flush=True)


def measure_interleaved(
    calls: Mapping[Name, Callable[[], Any]], windows: int, progress: Progress
) -> dict[Name, list[Any]]:
    """Calls every function once per window, so that all run under the same load.

    Returns the results of each function by name, without those of a warm-up window.
    """
    results: dict[Name, list[Any]] = {name: [] for name in calls}
    total = (windows + 1) * len(calls)
    for window in range(windows + 1):
        # Alternate the order: steadily growing load would bias the comparison.
        names = list(calls) if window % 2 else list(calls)[::-1]
        for position, name in enumerate(names):
            progress("measuring", window * len(calls) + position, total)
            result = calls[name]()
            if window:
                results[name].append(result)
    progress("measuring", total, total)
    return results


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Returns the `median`, minimum `low`, maximum `high` and all `windows`."""
    limits = {"low": min(values), "high": max(values)}
    return {"median": statistics.median(values), **limits, "windows": [*values]}


def median_ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Returns the median of the ratios a/b of two summaries, window by window."""
    return statistics.median(map(operator.truediv, a["windows"], b["windows"]))


def read_system_field(path: str, name: str) -> str | None:
    """Returns the value of a "name: value" line in a /proc file; None off Linux."""
    text = pathlib.Path(path).read_text() if os.path.exists(path) else ""
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
    """Formats measurements as a table; missing and None values are empty cells."""
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
    """Starts a child process that can call functions of `ccu_jax.benchmarks`.

    `environment` is set before the process imports NumPy, JAX or PyTorch. Yields
    `call("MODULE.FUNCTION", *args)`, which runs the function in the process. It
    re-raises a `UserError` of the function, raises a `UserError` if the process was
    killed, and converts any other error to a RuntimeError.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _set_environment, (environment,)) as pool:

        def call(name: str, *args: Any) -> Any:
            try:
                return pool.submit(_call, name, *args).result()
            except BrokenProcessPool:
                raise UserError(
                    f"{name}: the child process was killed, probably because memory "
                    "ran out; free some and rerun"
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
        # The parent process may be unable to unpickle the exception.
        line = str(error).partition("\n")[0]
        raise RuntimeError(f"{type(error).__name__}: {line}") from error

"""Reports the progress of a run on a terminal or in a log file, and as JSON events.

A terminal shows running stages live. A log file gets a line when a stage starts and
ends, and every ten seconds in between. All events are also written to `events.jsonl`.
"""

import contextlib
import datetime
import json
import pathlib
import time
import weakref
from collections.abc import Iterator
from typing import Any, BinaryIO

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ccu_jax.errors import replace_unprintable
from ccu_jax.storage.files import to_plain_json

LINE_EVERY_S = 10.0  # between two progress lines of a stage
_BAR_WIDTH = 20


class Stage:
    """A part of a run, with its steps and metrics; see `Reporter.stage`."""

    def __init__(self, reporter: "Reporter", title: str, label: str, total: int | None):
        """Starts the clock; `label` is the position in the plan, such as "[3/9] "."""
        self.title, self.label, self.total = title, label, total
        self.done, self.activity = 0, ""
        self._reporter = reporter
        self._metrics: dict[str, Any] = {}
        self._start_s = self._line_s = self._last_s = time.monotonic()
        # Time and step of the first update: compilation, which comes before it, does
        # not count in the rate.
        self._rate_start: tuple[float, int] | None = None

    def report_progress(self, activity: str, done: int, total: int) -> None:
        """Reports the finished steps of an activity; a new activity resets the rate."""
        if activity != self.activity:
            self.activity, self._rate_start = activity, None
        self.update(done, total)

    def update(self, done: int, total: int | None = None, **metrics: Any) -> None:
        """Reports the number of finished steps and the latest metrics."""
        if not self._reporter.is_active:
            return
        now_s = time.monotonic()
        self.total = self.total if total is None else total
        if self._rate_start is None or done < self.done:
            self._rate_start = (now_s, done)
        self.done, self._last_s = done, now_s
        # A new dict, as the thread of the live display may iterate over the old one.
        self._metrics = self._metrics | metrics
        if now_s - self._line_s >= LINE_EVERY_S:
            self._line_s = now_s
            self._reporter.log_progress(self)

    def metrics(self) -> dict[str, float | str]:
        """Returns the latest metrics; blocks until the device has computed them."""
        return {
            name: _to_number_or_text(value) for name, value in self._metrics.items()
        }

    def summary(self) -> dict[str, Any]:
        """Returns title, steps, seconds and metrics, the fields of an event."""
        return {
            "title": self.title,
            "done": self.done,
            "total": self.total,
            "seconds": time.monotonic() - self._start_s,
            "metrics": self.metrics(),
        }

    def details(self, *, with_remaining: bool = True) -> str:
        """Formats steps, remaining time, metrics and rate for a progress line."""
        steps = f"{self.done:,}" + (f"/{self.total:,}" if self.total else "")
        parts = [f"{self.activity} {steps}".strip()] if self.done or self.total else []
        for name, value in self.metrics().items():
            text = value if isinstance(value, str) else f"{value:.4g}"
            parts.append(f"{name} {text}")
        start_s, start = self._rate_start or (0.0, self.done)
        elapsed_s = self._last_s - start_s
        if self.done > start and elapsed_s > 0:
            rate = (self.done - start) / elapsed_s
            parts.append(f"{rate:.3g}/s")
            if with_remaining and self.total and self.total > self.done:
                remaining = format_duration((self.total - self.done) / rate)
                parts.insert(1, f"{remaining} left")
        return ", ".join(parts)


class NullStage:
    """A `Stage` that ignores all updates."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    report_progress = update


class Reporter:
    """Shows the stages of a run and writes `events.jsonl` in its working folder.

    Only the reporter of process 0 is active; those of other processes do nothing.
    """

    def __init__(self, workdir: pathlib.Path, is_active: bool):
        """Opens the event file for appending, unless the reporter is inactive."""
        self.is_active = is_active
        self.console: Console = _Console()
        self._titles: list[str] = []
        self._position = 0
        self._stages: list[Stage] = []
        self._live: Live | None = None
        self._file = _open_event_file(workdir / "events.jsonl") if is_active else None
        if self._file is not None:  # a failed run may never call `close`
            weakref.finalize(self, self._file.close)

    @property
    def is_live(self) -> bool:
        """Whether the output is a terminal, regardless of FORCE_COLOR."""
        return self.console.is_interactive and self.console.file.isatty()

    def event(self, kind: str, **fields: Any) -> None:
        """Appends an event with the UTC time as a JSON line; NaN becomes null."""
        if self._file is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        record = {"time": now, "kind": kind} | to_plain_json(fields)
        line = json.dumps(record, allow_nan=False) + "\n"
        self._file.write(line.encode())  # unbuffered, so that a crash loses nothing

    def log(self, text: str) -> None:
        """Prints a line and records it as an event."""
        self.event("log", text=text)
        self.print(text)

    def warn(self, text: str) -> None:
        """Prints a highlighted line and records it as an event."""
        self.event("warn", text=text)
        self.print(f"*** {text} ***", style="bold black on yellow")

    def plan(self, titles: list[str]) -> None:
        """Sets the titles of all stages, which numbers them as "[3/9]"."""
        self._titles, self._position = list(titles), 0
        self.event("plan", stages=self._titles)

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Stage]:
        """Shows a stage while the block runs, and its wall time at the end.

        The number of an outermost stage is the position of its title in the rest of the
        plan, or the next number if the plan lacks the title.
        """
        if not self.is_active:
            yield Stage(self, title, "", total)
            return
        stage = Stage(self, title, self._next_label(title), total)
        self.event("stage_start", title=title, total=total)
        self._stages.append(stage)
        if not self.is_live:
            self.print(f"{stage.label}{title} ...")
        elif self._live is None:
            self._live = Live(
                get_renderable=self._render,
                console=self.console,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        failure = None
        try:
            yield stage
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            summary = stage.summary()
            self._stages.remove(stage)
            if not self._stages:
                self._stop_live()
            self.event("stage_end", **summary, failure=failure)
            end = {None: "done", "Preempted": "preempted"}.get(failure, "failed")
            details = stage.details(with_remaining=False)
            parts = [end, details, f"{summary['seconds']:.1f} s"]
            text = f"{stage.label}{title}: {', '.join(filter(None, parts))}"
            self.print(text, "bold red" if end == "failed" else "")

    def log_progress(self, stage: Stage) -> None:
        """Records the progress of a stage; prints it if there is no live display."""
        self.event("progress", **stage.summary())
        if not self.is_live:
            self.print(f"{stage.label}{stage.title}: {stage.details()}")

    def close(self) -> None:
        """Stops the display and closes the event file; idempotent."""
        self._stop_live()
        if self._file is not None:
            self._file.close()
        self._file, self.is_active = None, False

    def print(self, text: str, style: str = "") -> None:
        """Prints text without recording an event; wraps lines only on a terminal."""
        if self.is_active:
            line = Text(self._printable(text), style=style)
            self.console.print(line, soft_wrap=not self.is_live)

    def print_table(self, header: list[str], rows: list[list[str]]) -> None:
        """Prints a table, right-aligned except for its first column."""
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        for column, name in enumerate(header):
            justify = "right" if column else "left"
            title = Text(self._printable(name))
            table.add_column(title, justify=justify, overflow="fold")
        for row in rows:
            style = "bold" if row[0].startswith("ccu") else ""
            table.add_row(*(Text(self._printable(cell)) for cell in row), style=style)
        if self.is_active:
            self.console.print(table)

    def _printable(self, text: str) -> str:
        """Replaces control characters and characters the terminal cannot encode."""
        encoding = self.console.encoding
        return replace_unprintable(text).encode(encoding, "replace").decode(encoding)

    def _next_label(self, title: str) -> str:
        """Advances to the stage's position in the plan; returns it as "[3/9] "."""
        if self._stages or not self._titles:
            return ""
        later = self._titles[self._position :]
        self._position += later.index(title) + 1 if title in later else 1
        return f"[{self._position}/{max(len(self._titles), self._position)}] "

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = None

    def _render(self) -> Table:
        """Renders the running stages as a table with one line each."""
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=_BAR_WIDTH)
        grid.add_column(no_wrap=True, overflow="crop")
        for stage in list(self._stages):
            bar = ProgressBar(stage.total, stage.done) if stage.total else ""
            title, details = (
                self._printable(text).replace("\n", " ")
                for text in (stage.label + stage.title, stage.details())
            )
            grid.add_row(bar, Text.assemble((title, "bold"), "  ", details))
        return grid


class _Console(Console):
    """A console that raises BrokenPipeError instead of exiting the process."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  rich calls this while it handles BrokenPipeError


def format_duration(seconds: float) -> str:
    """Formats a duration as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _to_number_or_text(value: Any) -> float | str:
    """Converts a metric to a float, or to a short string if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return str(value)[:20]


def _open_event_file(path: pathlib.Path) -> BinaryIO:
    """Opens the file for appending; removes an incomplete last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab+", buffering=0)
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    return file

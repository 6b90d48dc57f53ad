"""What a run shows while it runs: stages on the screen, every event in events.jsonl."""

import contextlib
import datetime
import json
import math
import pathlib
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ccu_jax.distributed.moves import moved
from ccu_jax.errors import printable
from ccu_jax.storage.files import to_plain_json

PLAIN_EVERY_S = 10.0  # a log file needs a sign of life, not an animation
METRICS_EVERY_S = 0.25  # reading a metric waits for the device that computes it


class Stage:
    """One stretch of work with a beginning, steps and an end; see `Reporter.stage`."""

    def __init__(self, reporter: "Reporter", title: str, label: str, total: int | None):
        """Starts the clock; `label` is the place in the plan, such as "[3/9] "."""
        self.title, self.label, self.total = title, label, total
        self.done, self.doing = 0, ""
        self._reporter = reporter
        self._pending: dict[str, Any] = {}
        self._read_metrics: dict[str, float | str] = {}
        self._start_s = self._told_s = time.monotonic()
        self._read_s = -math.inf
        self._first: tuple[float, int] | None = None
        self._last_s = self._start_s

    def report_progress(self, what: str, done: int, total: int) -> None:
        """Tells what is being done, and how far it is."""
        if what != self.doing:  # it has a rate of its own
            self.doing, self._first = what, None
        self.update(done, total)

    def update(self, done: int, total: int | None = None, **metrics: Any) -> None:
        """Tells that `done` of `total` steps are finished, with the latest metrics."""
        moved()  # the other processes may be waiting
        if not self._reporter.active:
            return
        now = time.monotonic()
        self.total = self.total if total is None else total
        # The rate counts from the first update on: before it lies the compilation.
        if self._first is None or done < self.done:
            self._first = (now, done)
        self.done, self._last_s = done, now
        self._pending.update(metrics)
        if now - self._read_s >= METRICS_EVERY_S:
            self._read(now)
        if now - self._told_s >= PLAIN_EVERY_S:
            self._told_s = now
            self._read(now)
            self._reporter.log_progress(self)

    def _read(self, now: float) -> None:
        """Fetches the metrics that came since the last time."""
        pending, self._pending, self._read_s = self._pending, {}, now
        read = {name: _number(value) for name, value in pending.items()}
        # A new dict, as another thread may be drawing the old one.
        self._read_metrics = self._read_metrics | read

    def seconds(self) -> float:
        """Returns the seconds since the stage began."""
        return time.monotonic() - self._start_s

    def share(self) -> float | None:
        """Returns how much is done, 0 to 1, or None where no total is known."""
        return min(1.0, max(0.0, self.done / self.total)) if self.total else None

    def metrics(self) -> dict[str, float | str]:
        """Returns the latest metrics."""
        self._read(time.monotonic())
        return self._read_metrics

    def words(self, *, left: bool = True) -> list[str]:
        """Returns step, metrics, rate and time left, the most telling first."""
        steps = f"{self.done:,}" + (f"/{self.total:,}" if self.total else "")
        words = [f"{self.doing} {steps}".strip()] if self.done or self.total else []
        for name, value in self._read_metrics.items():
            text = value if isinstance(value, str) else f"{value:.4g}"
            words.append(f"{name} {text}")
        first_s, first = self._first or (0.0, self.done)
        elapsed = self._last_s - first_s
        if self.done > first and elapsed > 0:
            rate = (self.done - first) / elapsed
            words.append(f"{rate:.3g}/s")
            if left and self.total and self.total > self.done:
                words.insert(
                    1, f"{format_duration((self.total - self.done) / rate)} left"
                )
        return words


class NullStage:
    """A stage that nobody watches, where whole runs are told of and not their steps."""

    def update(self, *args, **kwargs) -> None:
        """Tells nobody but the other processes, who may be waiting."""
        moved()


class Reporter:
    """Live progress on the screen and events.jsonl in the workdir.

    Silent unless `active` (process 0), so that every process can run the same code.
    """

    def __init__(self, workdir: pathlib.Path, active: bool):
        """Opens `workdir`/events.jsonl at its end; an inactive one touches nothing."""
        self.active = active
        self.console = _Screen()
        self._lock = threading.RLock()
        self._titles: list[str] = []
        self._place = 0
        self._stages: list[Stage] = []
        self._live: Live | None = None
        self._start_s = time.monotonic()
        self._file = _open_lines(workdir / "events.jsonl") if active else None
        if self._file is not None:  # also where a failed run never calls close
            weakref.finalize(self, self._file.close)

    @property
    def live(self) -> bool:
        """Whether the screen is a terminal (FORCE_COLOR alone does not make it one)."""
        return self.console.is_interactive and self.console.file.isatty()

    def event(self, kind: str, **fields: Any) -> None:
        """Writes one line of JSON with the UTC time; NaN becomes null."""
        if self._file is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        record = {"time": now, "kind": kind} | to_plain_json(fields)
        line = json.dumps(record, allow_nan=False) + "\n"
        with self._lock:
            self._file.write(line.encode())  # unbuffered: it survives a crash

    def log(self, text: str) -> None:
        """Prints one line above the live display; also an event."""
        self.event("log", text=text)
        self.print(text)

    def warn(self, text: str) -> None:
        """Prints a loud line; also an event."""
        self.event("warn", text=text)
        self.print(f"*** {text} ***", style="bold black on yellow")

    def plan(self, titles: list[str]) -> None:
        """Names the stages to come, so that the display can show "stage 3 of 9"."""
        self._titles, self._place = list(titles), 0
        self.event("plan", stages=self._titles)

    @contextlib.contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Stage]:
        """Shows a stage while the block runs, and its seconds at the end.

        A stage outside any other takes the next place in the plan (where it has the
        title of a later one: that place, as finished stages are skipped on resume).
        """
        if not self.active:
            yield Stage(self, title, "", total)
            return
        stage = Stage(self, title, self._next_label(title), total)
        self.event("stage_start", title=title, total=total)
        if not self.live:
            self.print(f"{stage.label}{title} ...")
        self._enter(stage)
        failure = None
        try:
            yield stage
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            seconds = stage.seconds()
            metrics = stage.metrics()
            self._leave(stage)
            fields = {"title": title, "done": stage.done, "total": stage.total}
            fields |= {"seconds": seconds, "metrics": metrics, "failure": failure}
            self.event("stage_end", **fields)
            words = [*stage.words(left=False), f"{seconds:.1f} s"]
            end = {None: "done", "Preempted": "left"}.get(failure, "failed")
            style = "bold red" if end == "failed" else ""
            self.print(f"{stage.label}{title}: {end}, {', '.join(words)}", style)

    def log_progress(self, stage: Stage) -> None:
        """Logs a running stage; a plain line where there is no live display."""
        fields = {"title": stage.title, "done": stage.done, "total": stage.total}
        fields |= {"seconds": stage.seconds(), "metrics": stage.metrics()}
        self.event("progress", **fields)
        if not self.live:
            self.print(f"{stage.label}{stage.title}: {', '.join(stage.words())}")

    def close(self) -> None:
        """Ends the display and the log; a second call does nothing."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
            if self._file is not None:
                self._file.close()
            self._live = self._file = None
            self.active = False

    def safe(self, text: str) -> str:
        """Returns `text` without control codes and what the screen cannot encode."""
        encoding = self.console.encoding
        return printable(text).encode(encoding, "replace").decode(encoding)

    def print(self, text: str, style: str = "") -> None:
        """Prints text as it is: no markup, no wrapping in a log file, no event."""
        if self.active:
            line = Text(self.safe(text), style=style)
            self.console.print(line, soft_wrap=not self.live)

    def print_table(self, header: list[str], lines: list[list[str]]) -> None:
        """Prints a table whose first column is text and the others are numbers."""
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        for place, name in enumerate(header):
            justify = "right" if place else "left"
            table.add_column(Text(self.safe(name)), justify=justify, overflow="fold")
        for line in lines:
            style = "bold" if line[0].startswith("ccu") else ""
            table.add_row(*(Text(self.safe(cell)) for cell in line), style=style)
        if self.active:
            self.console.print(table)

    def _next_label(self, title: str) -> str:
        """Moves to the next place in the plan and returns it as a label."""
        if self._stages or not self._titles:
            return ""
        later = self._titles[self._place :]
        self._place += later.index(title) + 1 if title in later else 1
        return f"[{self._place}/{max(len(self._titles), self._place)}] "

    def _enter(self, stage: Stage) -> None:
        self._stages.append(stage)
        if self.live and self._live is None:
            display = _Display(self)
            self._live = Live(
                display, console=self.console, refresh_per_second=4, transient=True
            )
            self._live.start()

    def _leave(self, stage: Stage) -> None:
        self._stages.remove(stage)
        if self._live is not None and not self._stages:
            self._live.stop()
            self._live = None

    def lines(self) -> list[tuple[str, float | None, list[str]]]:
        """Returns the live display: a title, the share done and details per line."""
        stages = list(self._stages)
        lines = [(s.label + s.title, s.share(), s.words()) for s in stages]
        if self._titles and stages:
            count = max(len(self._titles), self._place)
            share = (self._place - 1 + (stages[0].share() or 0.0)) / max(count, 1)
            elapsed = f"{format_duration(time.monotonic() - self._start_s)} so far"
            lines.insert(0, (f"stage {self._place} of {count}", share, [elapsed]))
        return lines


class _Screen(Console):
    """A console that does not end the process where nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  rich calls it while it handles BrokenPipeError


class _Display:
    """Draws the lines of a reporter, each cut to the width of the terminal."""

    def __init__(self, reporter: Reporter):
        self._reporter = reporter

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        width = options.max_width
        for title, share, words in self._reporter.lines():
            title = self._reporter.safe(title).replace("\n", " ")
            # Half the width is for the title, the rest for as many words as fit.
            line = Text(title, style="bold", no_wrap=True)
            overflow = "crop" if options.ascii_only else "ellipsis"
            line.truncate(max(width // 2, 1), overflow=overflow)
            if share is not None and width >= 60:
                line.append("  ").append_text(_bar(share, 20, options.ascii_only))
            for word in words:
                word = self._reporter.safe(f"  {word}").replace("\n", " ")
                if line.cell_len + cell_len(word) < width:
                    line.append(word, style="default not bold")
            yield line


def _bar(share: float, width: int, ascii_only: bool) -> Text:
    full = round(share * width)
    mark, rest = ("#", "-") if ascii_only else ("━", "─")
    return Text(mark * full, style="cyan").append(rest * (width - full), style="dim")


def format_duration(seconds: float) -> str:
    """Returns seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _number(value: Any) -> float | str:
    """Returns a metric, as text if it is no number: a display must not end a run."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return str(value)[:20]


def _open_lines(path: pathlib.Path) -> Any:
    """Opens a file of lines at its end, less a last line that a crash left torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab+", buffering=0)
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    return file
